"""What a step costs, learned from the steps measured so far.

    seconds = base + a * tokens + b * context + c * reads

`tokens` counts the tokens of all rows, `context` sums the number of tokens each of them attends to. `reads` sums the
lengths of the rows' contexts: a row's KV is read once, whether one token attends to it or a chunk of many, and for a
small chunk after a long context that is nearly all of the cost.

The four numbers are fitted with every result: least squares of the relative error, old steps fading out, no number
negative. Steps with and without chunks fade apart, each by newer ones of its own kind: during a long prompt no step
without a chunk is seen, and if the others' memory faded, what was left would no longer say what decoding alone costs,
which is what chunks are measured by.

The normal equations are solved by coordinate descent from the last solution, which begins with a guess: what the steps
so far cannot tell apart (so many decode rows from the cost of an empty step) keeps the guess's proportions.

Depends on nothing but its inputs, so that a replayed trace makes the same decisions.
"""

from __future__ import annotations

import math
from operator import add
from typing import NamedTuple

FADE = 0.99  # weight of the past at each new step
SWEEPS = 4
CONTEXT_SHARE = 1 / 4000  # guess: attending to 4000 tokens costs as much as all else of a token
READ_SHARE = 1 / 4000  # guess: and so does reading the KV of as many


class Work(NamedTuple):
    """What a step or a part of it does; see the module."""

    tokens: int
    context: int
    reads: int

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(self.tokens + other.tokens, self.context + other.context, self.reads + other.reads)


def decode_work(rows: int, context: int) -> Work:
    """Rows of one token each; `context` sums what they attend to."""
    return Work(rows, context, context)


def chunk_work(start: int, count: int) -> Work:
    """`count` tokens that follow `start` computed ones, in one row."""
    return Work(count, count * start + count * (count + 1) // 2, start + count)


class CostModel:
    """base_tokens: the guess at how many tokens' work an empty step costs."""

    def __init__(self, base_tokens: float) -> None:
        self.largest = 0  # tokens of the steps so far, at most
        self._theta = [base_tokens, 1.0, CONTEXT_SHARE, READ_SHARE]
        # normal equations, a row a number and the right side in its last column: of steps without chunks, and with
        self._seen = tuple([[0.0] * 5 for _ in range(4)] for _ in range(2))
        self._stale = False

    @property
    def measured(self) -> bool:
        """Whether any step was."""
        return self.largest > 0

    def observe(self, work: Work, seconds: float) -> None:
        """A step of that size took so long. Steps that were not timed (0 seconds) are ignored."""
        if seconds <= 0.0 or work.tokens <= 0:
            return
        if not self.measured:
            scale = seconds / self.seconds(work)
            self._theta = [value * scale for value in self._theta]
        self.largest = max(self.largest, work.tokens)
        row = (1.0 / seconds, work.tokens / seconds, work.context / seconds, work.reads / seconds)
        for x, equation in zip(row, self._seen[work.context > work.reads], strict=True):
            equation[0] = FADE * equation[0] + x * row[0]
            equation[1] = FADE * equation[1] + x * row[1]
            equation[2] = FADE * equation[2] + x * row[2]
            equation[3] = FADE * equation[3] + x * row[3]
            equation[4] = FADE * equation[4] + x
        self._stale = True

    def seconds(self, work: Work) -> float:
        """The estimate; in units of one token's work before anything was measured."""
        base, per_token, per_context, per_read = self._solution()
        return base + per_token * work.tokens + per_context * work.context + per_read * work.reads

    def added(self, work: Work) -> float:
        """What a step's estimate grows by with this work."""
        return self.seconds(work) - self._solution()[0]

    def one_more(self, context: int) -> float:
        """What a step's estimate grows by when a row with `context` computed tokens has a token more."""
        _, per_token, per_context, per_read = self._solution()
        return per_token + per_read + per_context * context

    def tokens_within(self, budget: float, context: int) -> int:
        """How many tokens of one sequence with `context` computed tokens cost at most `budget` on top of a step."""
        _, per_token, per_context, per_read = self._solution()
        budget -= per_read * context
        if budget <= 0.0:
            return 0
        linear, square = per_token + per_read + per_context * context, per_context / 2
        if square <= 0.0:
            return int(budget / linear) if linear > 0.0 else 2**31
        # square * n^2 + linear * n = budget, in the form that does not cancel when square is small
        return int(2 * budget / (linear + math.sqrt(linear * linear + 4 * square * budget)))

    def _solution(self) -> list[float]:
        if self._stale:
            theta = self._theta
            equations = [list(map(add, *pair)) for pair in zip(*self._seen, strict=True)]
            for _ in range(SWEEPS):
                for i, row in enumerate(equations):
                    a, b, c, d, right = row
                    rest = a * theta[0] + b * theta[1] + c * theta[2] + d * theta[3]
                    theta[i] = max(0.0, theta[i] + (right - rest) / row[i])
            self._stale = False
        return self._theta
