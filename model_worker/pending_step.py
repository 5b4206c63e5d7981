"""A step that was launched: what comes back of it, and how the host reads that. Q sampled places, R rows."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from vibe_sgl_lite.model_worker.device import Array, ReadBack
from vibe_sgl_lite.model_worker.pooling import PooledRows
from vibe_sgl_lite.model_worker.sampling.constraints import Constrained, StepMask
from vibe_sgl_lite.model_worker.sampling.logprobs import Logprobs
from vibe_sgl_lite.model_worker.sampling.prompt_logprobs import PromptScores
from vibe_sgl_lite.model_worker.step_input import StepInput
from vibe_sgl_lite.runtime.errors import EngineError
from vibe_sgl_lite.runtime.messages import FailedRow, RowLogprobs, RowPooled, StepResult, TokenLogprob, pack_ids


@dataclass
class PendingStep:
    """One of them. read_back: None for a step without rows, else what comes back, and `results` once it is here.

    First the sampled ids, Q and padding rows: negative where none could be drawn; then, where the device made drafts,
    what `StepInput.accept` tells; then, if any row may be bad, flags of rows with bad hidden states, R and padding
    rows, and of those with bad logits, as the ids: all in one. Then, packed,
    logprobs of the sampled tokens and of each part of `prompts`; then the values of `pooled`.
    """

    number: int
    epoch: int
    step: StepInput
    started: float
    forward_s: float = 0.0
    read_back: ReadBack | None = None
    constrained: Constrained = field(default_factory=list)
    mask: StepMask | None = None
    logprobs: Logprobs | None = None
    prompts: list[PromptScores] = field(default_factory=list)
    pooled: list[PooledRows] = field(default_factory=list)
    results: list[Array] | None = None
    total_s: float = 0.0

    @property
    def late(self) -> list[int]:
        """Rows without drafts whose masks came too late: they yield nothing."""
        late = [] if self.mask is None else self.mask.late
        return [row for row in self.step.sampling_rows[late].tolist() if row not in self.step.drafts] if late else []

    def done(self) -> bool:
        """Whether `collect` would return at once."""
        return self.read_back is None or self.read_back.done()

    @cached_property
    def tokens(self) -> list[list[int]]:
        """Each row's sampled tokens that count, once `results` are here: up to the first that is not the draft in its
        place, and before the first whose mask was late."""
        assert self.results is not None
        if self.step.rooms is not None:
            _, yields = self._told
            ids_by_row = self.results[0][: len(self.step.sampling_rows)].reshape(len(yields), -1)
            return [ids[:count] for ids, count in zip(ids_by_row.tolist(), yields, strict=True)]
        rows, late = self.step.sampling_rows.tolist(), {*self.mask.late} if self.mask is not None else set()
        ids, place = self.results[0][: len(rows)].tolist(), 0
        tokens: list[list[int]] = [[] for _ in self.step.slots]
        while place < len(rows):
            row = rows[place]
            drafts = self.step.drafts.get(row, [])
            for at, draft in enumerate([*drafts, -1], place):
                if at in late:
                    break
                tokens[row].append(ids[at])
                if ids[at] != draft:
                    break
            place += 1 + len(drafts)
        return tokens

    @property
    def _told(self) -> tuple[list[int], list[int]]:
        """Of each row of a step that the device drafted: its drafts, and how many of its tokens count."""
        assert self.results is not None
        own, places, rows = len(self.step.slots), len(self.step.places), self.step.batch.num_rows
        drafted, yields = self.results[0][places : places + rows], self.results[0][places + rows : places + 2 * rows]
        return drafted[:own].tolist(), yields[:own].tolist()

    @property
    def _cuts(self) -> bool:
        """Whether a row yields another number of tokens than it has places."""
        return bool(self.step.drafts) or self.step.rooms is not None or bool(self.late)

    def _drafted(self) -> bytes:
        if self.step.rooms is not None and self.results is not None:
            return pack_ids(self._told[0])
        drafts = self.step.drafts
        return pack_ids(len(drafts.get(row, ())) for row in range(len(self.step.slots))) if drafts else b""

    def result(self) -> StepResult:
        """What the scheduler learns of it; once `results` are here, if any are to come."""
        num_rows = len(self.step.slots)
        token_ids, failed, counts = np.full(num_rows, -1, dtype=np.int32), set[int](), b""
        stuck: list[int] = []
        if self.results is not None:
            failed = self._bad_rows()
            token_ids[self.step.sampling_rows] = self.results[0][: len(self.step.sampling_rows)]
            token_ids[[*failed]] = -1
            if self._cuts:
                yielded = [[] if row in failed else tokens for row, tokens in enumerate(self.tokens)]
                token_ids = np.array([token for tokens in yielded for token in tokens], dtype=np.int32)
                counts = pack_ids(map(len, yielded))
            if self.mask is not None:
                stuck = [row for row in self.step.sampling_rows[self.mask.failed].tolist() if row not in failed]
        return StepResult(
            step=self.number,
            token_ids=token_ids.tobytes(),
            failed=[FailedRow(row) for row in sorted(failed)] + [FailedRow(row, EngineError.code) for row in stuck],
            logprobs=self._logprobs(failed) if self.logprobs is not None or self.prompts else [],
            forward_s=self.forward_s,
            total_s=self.total_s,
            counts=counts,
            epoch=self.epoch,
            drafted=self._drafted(),
            pooled=self._pooled(failed),
        )

    def _bad_rows(self) -> set[int]:
        """Rows with NaN or inf in their hidden states or logits."""
        assert self.results is not None
        own, rows, sampled = len(self.step.sampling_rows), len(self.step.slots), len(self.step.places)
        ids = self.results[0][:own]
        flags = self.results[0][sampled + (0 if self.step.rooms is None else 2 * self.step.batch.num_rows) :]
        flags = flags.astype(np.bool_)
        if self.step.rooms is None:
            bad = self.step.sampling_rows[ids < 0].tolist()
        else:
            bad = [row for row, tokens in enumerate(self.tokens) if min(tokens, default=0) < 0]
        if len(flags):
            bad += np.flatnonzero(flags[:rows]).tolist()
            bad += self.step.sampling_rows[flags[self.step.batch.num_rows :][:own]].tolist()
        return {*bad}

    def _pooled(self, failed: set[int]) -> list[RowPooled]:
        pooled = []
        for part, values in zip(self.pooled, (self.results or [])[-len(self.pooled) :], strict=False):
            pooled += [
                RowPooled(row, values[i, :size].tobytes())
                for i, (row, size) in enumerate(zip(part.rows, part.sizes, strict=True))
                if row not in failed
            ]
        return pooled

    def _logprobs(self, failed: set[int]) -> list[RowLogprobs]:
        """What each row that did not fail asked for, by row."""
        assert self.results is not None
        packed = iter(self.results[1:])
        sampled: dict[int, list[TokenLogprob]] = {}
        if self.logprobs is not None:
            for place, entry in self.logprobs.entries(next(packed)):
                sampled.setdefault(int(self.step.sampling_rows[place]), []).append(entry)
        if self._cuts:
            sampled = {row: entries[: len(self.tokens[row])] for row, entries in sampled.items()}
        prompts = {
            prompt.row: (prompt.first, tuple(e for part in prompt.parts for _, e in part.entries(next(packed))))
            for prompt in self.prompts
        }
        return [
            RowLogprobs(row, tuple(sampled.get(row, ())), *prompts.get(row, (0, ())))
            for row in sorted({*sampled, *prompts} - failed)
        ]
