"""What a step costs, learned from the steps measured so far.

    seconds = base + a * tokens + b * context

`tokens` counts the tokens of all rows, `context` sums the number of tokens each of them attends to. The three numbers
are fitted with every result: least squares of the relative error, old steps fading out, no number negative. The normal
equations are solved by coordinate descent from the last solution, which begins with a guess: what the steps so far
cannot tell apart (a constant number of decode rows from the cost of an empty step) keeps the guess's proportions.

Depends on nothing but its inputs, so that a replayed trace makes the same decisions.
"""

from __future__ import annotations

import math

FADE = 0.99  # weight of the past at each new step
SWEEPS = 4
CONTEXT_SHARE = 1 / 4000  # guess: attending to 4000 tokens costs as much as all else of a token


class CostModel:
    """base_tokens: the guess at how many tokens' work an empty step costs."""

    def __init__(self, base_tokens: float) -> None:
        self.measured = False
        self._theta = [base_tokens, 1.0, CONTEXT_SHARE]
        self._left = [[0.0] * 3 for _ in range(3)]
        self._right = [0.0] * 3
        self._stale = False

    def observe(self, tokens: int, context: int, seconds: float) -> None:
        """A step of that size took so long. Steps that were not timed (0 seconds) are ignored."""
        if seconds <= 0.0 or tokens <= 0:
            return
        if not self.measured:
            scale = seconds / self.seconds(tokens, context)
            self._theta = [value * scale for value in self._theta]
            self.measured = True
        row = (1.0 / seconds, tokens / seconds, context / seconds)
        for i, x in enumerate(row):
            left = self._left[i]
            left[0] = FADE * left[0] + x * row[0]
            left[1] = FADE * left[1] + x * row[1]
            left[2] = FADE * left[2] + x * row[2]
            self._right[i] = FADE * self._right[i] + x
        self._stale = True

    def seconds(self, tokens: int, context: int) -> float:
        """The estimate; in units of one token's work before anything was measured."""
        base, per_token, per_context = self._solution()
        return base + per_token * tokens + per_context * context

    def tokens_within(self, budget: float, context: int) -> int:
        """How many tokens of one sequence with `context` computed tokens cost at most `budget` on top of a step."""
        _, per_token, per_context = self._solution()
        if budget <= 0.0:
            return 0
        linear, square = per_token + per_context * context, per_context / 2
        if square <= 0.0:
            return int(budget / linear) if linear > 0.0 else 2**31
        # square * n^2 + linear * n = budget, in the form that does not cancel when square is small
        return int(2 * budget / (linear + math.sqrt(linear * linear + 4 * square * budget)))

    def _solution(self) -> list[float]:
        if self._stale:
            theta, left, right = self._theta, self._left, self._right
            for _ in range(SWEEPS):
                for i in range(3):
                    rest = left[i][0] * theta[0] + left[i][1] * theta[1] + left[i][2] * theta[2]
                    theta[i] = max(0.0, theta[i] + (right[i] - rest) / left[i][i])
            self._stale = False
        return self._theta


def chunk_context(start: int, count: int) -> int:
    """Tokens attended to by `count` tokens that follow `start` computed ones."""
    return count * start + count * (count + 1) // 2
