"""Applies a step's result: new tokens, ends, failures, and what the cache may now keep.

A row of a request that has finished meanwhile is dropped. A row of a retracted request counts: its tokens are kept, and
may even be its last.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence, Set
from itertools import accumulate

import msgspec

from vibe_sgl_lite.runtime.errors import NumericalError
from vibe_sgl_lite.runtime.messages import (
    ErrorInfo,
    Finish,
    NextTokens,
    OpenText,
    RowLogprobs,
    StepResult,
    TokenLogprob,
    TokenOutput,
    split_ids,
    unpack_ids,
)
from vibe_sgl_lite.scheduler.batch import DecodeRows, PrefillChunk, Step
from vibe_sgl_lite.scheduler.request import TOKEN_BYTES, Request
from vibe_sgl_lite.scheduler.speculation import Speculation
from vibe_sgl_lite.scheduler.state import SchedulerState

NO_TOKEN = b"\xff" * TOKEN_BYTES  # -1


class Outputs(msgspec.Struct):
    """What to tell the detokenizer: `opens`, samples that have their first output in `tokens`, before these."""

    opens: list[OpenText] = []
    tokens: list[TokenOutput] = []
    next_tokens: NextTokens = NextTokens()

    def __bool__(self) -> bool:
        return bool(self.tokens or self.next_tokens)


class ResultApplier:
    """Turns results into outputs and state changes."""

    def __init__(self, state: SchedulerState, speculation: Speculation) -> None:
        self._state = state
        self._speculation = speculation
        self._unopened: dict[int, Request] = {}  # those that decode and have had no token yet
        self.num_completion_tokens = 0

    def apply(self, step: Step, result: StepResult) -> Outputs:
        """`result` is that of `step`, the oldest one in flight."""
        self._state.completed_step = step.number
        outputs = Outputs()
        failed = {row.row: row.code for row in result.failed}
        logprobs = {row.row: row for row in result.logprobs}
        pooled = {row.row: row.values for row in result.pooled}
        tokens, decode = _RowTokens(result, step.num_rows), step.decode
        drafted, accepted = self._observe_drafts(step, result, tokens)
        if decode and not step.chunks:
            self._speculation.observe_step(len(decode), result.total_s, step.drafts, drafted, accepted)
        planned = step.tokens
        if drafted or len(result.token_ids) != TOKEN_BYTES * step.num_rows:
            apart = list(range(len(decode)))
        else:
            if planned is not None:
                self._take_room_back(decode, planned)
                planned = None
            apart = self._rows_apart(decode, result.token_ids, failed.keys() | logprobs.keys())
            self._take_next_tokens(decode, result.token_ids, apart, outputs)
        for row in apart:
            if row in failed:
                self._fail(decode.requests[row], failed[row], outputs)
            else:
                most = 1 if planned is None else planned[row]
                self._sampled(decode.requests[row], tokens[row], most, logprobs.get(row), outputs)
        for row, chunk in enumerate(step.chunks, len(decode)):
            self._chunk(chunk, tokens[row], failed.get(row), logprobs.get(row), outputs)
            if chunk.samples and chunk.request.pools and not chunk.request.finished:
                self.end(chunk.request, Finish("stop"), outputs, pooled[row])
        self._state.step_done(step)
        return outputs

    def end(self, request: Request, finish: Finish, outputs: Outputs, pooled: bytes | None = None) -> None:
        """End a sample with a terminal output without tokens. pooled: what it gets in place of them."""
        self._open(request, outputs)
        outputs.tokens.append(
            TokenOutput(request.uid, request.num_generated, b"", finish=finish, usage=request.usage(), pooled=pooled)
        )
        self._state.finish(request)

    def _observe_drafts(self, step: Step, result: StepResult, tokens: _RowTokens) -> tuple[int, int]:
        """How many drafts there were in all, and how many held."""
        if step.drafts is None or (step.chunks and not result.drafted):  # on some devices there are none beside chunks
            return 0, 0
        drafted = unpack_ids(result.drafted) or [0] * step.num_rows
        total = 0
        for row, (request, room, count) in enumerate(zip(step.decode, step.drafts.rooms, drafted, strict=False)):
            if tokens[row]:  # else it failed, or its mask was late
                accepted = len(tokens[row]) // TOKEN_BYTES - 1
                total += accepted
                if room:
                    self._speculation.observe(request, count, accepted)
        return sum(drafted), total

    def _take_room_back(self, decode: DecodeRows, planned: Sequence[int]) -> None:
        """Of a step in which nothing was proposed for it."""
        for request, count in zip(decode, planned, strict=True):
            if count > 1 and not request.finished:
                self._state.reject_drafts(request, count - 1)

    def _rows_apart(self, decode: DecodeRows, packed: bytes, told: Set[int]) -> list[int]:
        """The rows, all of one token, of which there may be more to tell: they end, may have ended before, or have
        their first output. told: those of which the result tells more."""
        state, requests, ids = self._state, decode.requests, array("i", packed)
        rows = {row for row in told if row < len(decode)}
        for place in (state.ending, state.leaving, self._unopened):
            for request in place.values():
                if request in requests:
                    rows.add(requests.index(request))
        if not state.ends.keys().isdisjoint(ids):
            by_row = enumerate(zip(decode, ids, strict=False))
            rows.update(row for row, (request, token) in by_row if token in request.ends)
        return sorted(rows)

    def _take_next_tokens(self, decode: DecodeRows, packed: bytes, apart: list[int], outputs: Outputs) -> None:
        """The hot loop: of all rows but those `apart` there is nothing to tell but the next token."""
        requests, uids, ids = decode.requests[:], decode.uids[:], array("i", packed)[: len(decode)]
        for row in reversed(apart):
            del requests[row], uids[row], ids[row]
        outputs.next_tokens = NextTokens(uids.tobytes(), ids.tobytes())
        for request, token in zip(requests, split_ids(outputs.next_tokens.token_ids), strict=True):
            request.tokens += token
        self.num_completion_tokens += len(ids)

    def _chunk(
        self, chunk: PrefillChunk, tokens: bytes, failed: str | None, logprobs: RowLogprobs | None, outputs: Outputs
    ) -> None:
        request, state = chunk.request, self._state
        if failed is not None:
            self._fail(request, failed, outputs)
            return
        assert chunk.samples or not tokens, f"{request}: a row that does not sample"
        if logprobs is not None and request.prompt_logprobs is not None:
            for position, entry in enumerate(logprobs.prompt, logprobs.prompt_first):
                request.prompt_logprobs[position] = entry
        if not request.finished and request.uid not in state.leaving:
            in_flight = request.last_step > state.completed_step
            again = chunk.samples and not tokens and not request.pools  # its last token is computed once more
            changes = state.memory.store(request, chunk.end - again, in_flight=in_flight)
            state.builder.replace_pages(request, changes)
            if chunk.samples:
                state.leaders.end(request)
            else:
                state.leaders.begin(request)
        if chunk.samples and not request.pools:
            self._sampled(request, tokens, 1, logprobs, outputs)

    def _sampled(
        self, request: Request, tokens: bytes, planned: int, logprobs: RowLogprobs | None, outputs: Outputs
    ) -> None:
        """What a row yielded, of `planned` tokens at most; its request may have finished meanwhile.

        Tokens behind an end are not the request's any more.
        """
        if request.finished:
            return
        ids = unpack_ids(tokens)
        assert len(ids) <= planned, f"{request}: {len(ids)} tokens from a row of {planned}"
        if len(ids) < planned:
            self._state.reject_drafts(request, planned - len(ids))
        if not ids:  # its mask was late
            if not request.opened:
                self._unopened[request.uid] = request
            return
        self._open(request, outputs)
        first, finish = request.num_tokens, None
        for count, token in enumerate(ids, 1):
            if token in request.ends or first + count > request.kv_limit:
                finish = Finish("stop", matched=token) if token in request.ends else Finish("length")
                tokens = tokens[: count * TOKEN_BYTES]
                break
        request.tokens += tokens
        count = len(tokens) // TOKEN_BYTES
        self.num_completion_tokens += count
        index = first - request.num_prompt_tokens
        outputs.tokens.append(
            TokenOutput(
                request.uid,
                index,
                tokens,
                finish=finish,
                usage=None if finish is None else request.usage(),
                logprobs=logprobs.sampled[:count] or None if logprobs is not None else None,
                prompt_logprobs=self._prompt_logprobs(request, index),
            )
        )
        if finish is not None:
            self._state.finish(request)

    def _fail(self, request: Request, code: str, outputs: Outputs) -> None:
        request.tainted = True
        if not request.finished:
            message = (
                "NaN or inf in the hidden states or logits of this request" if code == NumericalError.code else code
            )
            self.end(request, Finish("error", error=ErrorInfo(code, message)), outputs)

    @staticmethod
    def _prompt_logprobs(request: Request, index: int) -> tuple[TokenLogprob | None, ...] | None:
        """With the first token go the logprobs of the prompt; its first token has none."""
        if request.prompt_logprobs is None or index > 0:
            return None
        return tuple(request.prompt_logprobs.get(position) for position in range(request.num_prompt_tokens))

    def _open(self, request: Request, outputs: Outputs) -> None:
        if not request.opened:
            request.opened = True
            self._unopened.pop(request.uid, None)
            outputs.opens.append(request.open_text(self._state.weight_version))


class _RowTokens:
    """The packed ids that each row yielded, by its number. A result without counts has one id a row: -1 for none."""

    def __init__(self, result: StepResult, num_rows: int) -> None:
        self._packed = result.token_ids
        self._bounds: Sequence[int] = range(num_rows + 1)
        if result.counts:
            self._bounds = [0, *accumulate(unpack_ids(result.counts))]
        assert (len(self._bounds) - 1, self._bounds[-1] * TOKEN_BYTES) == (num_rows, len(self._packed)), (
            f"step {result.step}: {len(self._bounds) - 1} results with {len(self._packed)} bytes of tokens "
            f"for {num_rows} rows"
        )

    def __getitem__(self, row: int) -> bytes:
        tokens = self._packed[self._bounds[row] * TOKEN_BYTES : self._bounds[row + 1] * TOKEN_BYTES]
        return b"" if tokens == NO_TOKEN else tokens
