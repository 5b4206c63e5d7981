"""Applies a step's result: new tokens, ends, failures, and what the cache may now keep.

A row of a request that has finished meanwhile is dropped. A row of a retracted request counts: its tokens are kept, and
may even be its last.
"""

from __future__ import annotations

from array import array

import msgspec

from vibe_sgl_lite.runtime.errors import NumericalError
from vibe_sgl_lite.runtime.messages import (
    ErrorInfo,
    Finish,
    OpenText,
    RowLogprobs,
    StepResult,
    TokenLogprob,
    TokenOutput,
    unpack_ids,
)
from vibe_sgl_lite.scheduler.batch import PrefillChunk, Step
from vibe_sgl_lite.scheduler.request import TOKEN_BYTES, Request
from vibe_sgl_lite.scheduler.speculation import Speculation
from vibe_sgl_lite.scheduler.state import SchedulerState

NO_TOKEN = b"\xff" * TOKEN_BYTES  # -1


class Outputs(msgspec.Struct):
    """What to tell the detokenizer: `opens`, samples that have their first output in `tokens`, before these."""

    opens: list[OpenText] = []
    tokens: list[TokenOutput] = []

    def __bool__(self) -> bool:
        return bool(self.tokens)


class ResultApplier:
    """Turns results into outputs and state changes."""

    def __init__(self, state: SchedulerState, speculation: Speculation) -> None:
        self._state = state
        self._speculation = speculation
        self.num_completion_tokens = 0

    def apply(self, step: Step, result: StepResult) -> Outputs:
        """`result` is that of `step`, the oldest one in flight."""
        self._state.completed_step = step.number
        outputs = Outputs()
        failed = {row.row: row.code for row in result.failed}
        logprobs = {row.row: row for row in result.logprobs}
        pooled = {row.row: row.values for row in result.pooled}
        plain = not (result.counts or failed or logprobs or step.tokens)
        rows = [] if plain and not step.chunks else tokens_by_row(result, step.num_rows)
        accepted = self._observe_drafts(step, result, rows)
        if step.decode and not step.chunks:
            self._speculation.observe_step(len(step.decode), result.total_s, step.drafts, accepted)
        if plain:
            self._decode_rows(step, result.token_ids, outputs)
        else:
            for row, request in enumerate(step.decode):
                if row in failed:
                    self._fail(request, failed[row], outputs)
                else:
                    planned = 1 if step.tokens is None else step.tokens[row]
                    self._sampled(request, rows[row], planned, logprobs.get(row), outputs)
        for row, chunk in enumerate(step.chunks, len(step.decode)):
            self._chunk(chunk, rows[row], failed.get(row), logprobs.get(row), outputs)
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

    def _observe_drafts(self, step: Step, result: StepResult, rows: list[bytes]) -> int:
        """How many drafts held in all."""
        if step.drafts is None or (step.chunks and not result.drafted):  # on some devices there are none beside chunks
            return 0
        drafted = unpack_ids(result.drafted) or [0] * step.num_rows
        total = 0
        for request, room, count, tokens in zip(step.decode, step.drafts.rooms, drafted, rows, strict=False):
            if tokens:  # else it failed, or its mask was late
                accepted = len(tokens) // TOKEN_BYTES - 1
                total += accepted
                if room:
                    self._speculation.observe(request, count, accepted)
        return total

    def _decode_rows(self, step: Step, packed: bytes, outputs: Outputs) -> None:
        """The hot loop: rows that sampled one token each, with nothing else to tell."""
        ids = array("i")
        ids.frombytes(packed)
        assert len(ids) == step.num_rows, f"step {step.number}: {len(ids)} results for {step.num_rows} rows"
        append = outputs.tokens.append
        at = taken = 0
        for request, token in zip(step.decode, ids, strict=False):
            if not request.finished:
                tokens = request.tokens
                first = len(tokens) // TOKEN_BYTES
                one = packed[at : at + TOKEN_BYTES]
                if first >= request.kv_limit or token in request.ends or not request.opened:
                    self._sampled(request, one, 1, None, outputs)
                else:
                    tokens += one
                    taken += 1
                    append(TokenOutput(request.uid, first - request.num_prompt_tokens, one))
            at += TOKEN_BYTES
        self.num_completion_tokens += taken

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
        if not ids:
            return  # its mask was late
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
            outputs.opens.append(request.open_text(self._state.weight_version))


def tokens_by_row(result: StepResult, num_rows: int) -> list[bytes]:
    """The packed ids that each row yielded."""
    packed = result.token_ids
    counts = unpack_ids(result.counts) if result.counts else [1] * num_rows
    assert (len(counts), sum(counts) * TOKEN_BYTES) == (num_rows, len(packed)), (
        f"step {result.step}: {len(counts)} results with {len(packed)} bytes of tokens for {num_rows} rows"
    )
    rows, at = [], 0
    for count in counts:
        rows.append(packed[at : at + count * TOKEN_BYTES])
        at += count * TOKEN_BYTES
    return rows if result.counts else [b"" if row == NO_TOKEN else row for row in rows]
