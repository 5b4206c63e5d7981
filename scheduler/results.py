"""Applies a step's result: new tokens, ends, failures, and what the cache may now keep.

A row of a request that has finished meanwhile is dropped. A row of a retracted request counts: its token is kept, and
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
    RequestRejected,
    RowLogprobs,
    StepResult,
    TokenLogprob,
    TokenOutput,
)
from vibe_sgl_lite.scheduler.batch import Chunk, Step
from vibe_sgl_lite.scheduler.request import TOKEN_BYTES, Request
from vibe_sgl_lite.scheduler.state import SchedulerState


class Outputs(msgspec.Struct):
    """What the core wants told to others. Send `opens` before `tokens`.

    opens: samples that have their first output in `tokens`. rejected: requests refused at arrival.
    """

    opens: list[OpenText] = []
    tokens: list[TokenOutput] = []
    rejected: list[RequestRejected] = []

    def __bool__(self) -> bool:
        return bool(self.opens or self.tokens or self.rejected)


class ResultApplier:
    """Turns results into outputs and state changes."""

    def __init__(self, state: SchedulerState) -> None:
        self._state = state
        self.num_completion_tokens = 0

    def apply(self, step: Step, result: StepResult) -> Outputs:
        """`result` is that of `step`, the oldest one in flight."""
        ids = array("i")
        ids.frombytes(result.token_ids)
        assert len(ids) == step.num_rows, f"step {step.number}: {len(ids)} results for {step.num_rows} rows"
        self._state.completed_step = step.number
        outputs = Outputs()
        failed = {row.row: row.code for row in result.failed}
        logprobs = {row.row: row for row in result.logprobs}
        if failed or logprobs:
            self._decode_rows_checked(step, ids, failed, logprobs, outputs)
        else:
            self._decode_rows(step, ids, result.token_ids, outputs)
        for row, chunk in enumerate(step.chunks, len(step.decode)):
            self._chunk(chunk, ids[row], failed.get(row), logprobs.get(row), outputs)
        self._state.step_done(step)
        return outputs

    def end(self, request: Request, finish: Finish, outputs: Outputs) -> None:
        """End a sample from outside a step, with a terminal output without tokens."""
        self._open(request, outputs)
        outputs.tokens.append(
            TokenOutput(request.uid, request.num_generated, b"", finish=finish, usage=request.usage())
        )
        self._state.finish(request)

    def _decode_rows(self, step: Step, ids: array[int], packed: bytes, outputs: Outputs) -> None:
        """The hot loop: rows that sampled one token each, with nothing else to tell."""
        before = len(outputs.tokens)
        append = outputs.tokens.append
        at = 0
        for request, token in zip(step.decode, ids, strict=False):
            if not request.finished:
                tokens = request.tokens
                first = len(tokens) // TOKEN_BYTES
                one = packed[at : at + TOKEN_BYTES]
                tokens += one
                if first >= request.kv_limit or token in request.ends:
                    self._finish(request, token, one, None, outputs)
                else:
                    append(TokenOutput(request.uid, first - request.num_prompt_tokens, one))
            at += TOKEN_BYTES
        self.num_completion_tokens += len(outputs.tokens) - before

    def _decode_rows_checked(
        self,
        step: Step,
        ids: array[int],
        failed: dict[int, str],
        logprobs: dict[int, RowLogprobs],
        outputs: Outputs,
    ) -> None:
        for row, request in enumerate(step.decode):
            if row in failed:
                self._fail(request, failed[row], outputs)
            else:
                self._sampled(request, ids[row], logprobs.get(row), outputs)

    def _chunk(
        self, chunk: Chunk, token: int, failed: str | None, logprobs: RowLogprobs | None, outputs: Outputs
    ) -> None:
        request, state = chunk.request, self._state
        if failed is not None:
            self._fail(request, failed, outputs)
            return
        assert (token >= 0) == chunk.samples, f"{request}: a row that {'' if chunk.samples else 'does not '}sample"
        if logprobs is not None and request.prompt_logprobs is not None:
            for position, entry in enumerate(logprobs.prompt, logprobs.prompt_first):
                request.prompt_logprobs[position] = entry
        if not request.finished and request.uid not in state.leaving:
            in_flight = request.last_step > state.completed_step
            changes = state.memory.store(request, chunk.end, in_flight=in_flight)
            state.builder.replace_pages(request, changes)
            if chunk.samples:
                state.leaders.end(request)
            else:
                state.leaders.begin(request)
        if chunk.samples:
            self._sampled(request, token, logprobs, outputs)

    def _sampled(self, request: Request, token: int, logprobs: RowLogprobs | None, outputs: Outputs) -> None:
        """A token of a request that may have finished meanwhile."""
        if request.finished:
            return
        self.num_completion_tokens += 1
        self._open(request, outputs)
        one = token.to_bytes(TOKEN_BYTES, "little")
        first = request.num_tokens
        request.tokens += one
        if first >= request.kv_limit or token in request.ends:
            self._finish(request, token, one, logprobs, outputs)
        else:
            sampled = logprobs.sampled or None if logprobs is not None else None
            index = first - request.num_prompt_tokens
            outputs.tokens.append(
                TokenOutput(
                    request.uid, index, one, logprobs=sampled, prompt_logprobs=self._prompt_logprobs(request, index)
                )
            )

    def _finish(self, request: Request, token: int, one: bytes, logprobs: RowLogprobs | None, outputs: Outputs) -> None:
        """Its last token is in: an end token, or the one that makes it full."""
        finish = Finish("stop", matched=token) if token in request.ends else Finish("length")
        sampled = logprobs.sampled or None if logprobs is not None else None
        index = request.num_generated - 1
        outputs.tokens.append(
            TokenOutput(
                request.uid,
                index,
                one,
                finish=finish,
                usage=request.usage(),
                logprobs=sampled,
                prompt_logprobs=self._prompt_logprobs(request, index),
            )
        )
        self._state.finish(request)

    def _fail(self, request: Request, code: str, outputs: Outputs) -> None:
        request.failed = True
        if not request.finished:
            message = "NaN or inf in the hidden states of this request" if code == NumericalError.code else code
            self.end(request, Finish("error", error=ErrorInfo(code, message)), outputs)

    @staticmethod
    def _prompt_logprobs(request: Request, index: int) -> tuple[TokenLogprob | None, ...] | None:
        """With the first token go the logprobs of the prompt; its first token has none."""
        if request.prompt_logprobs is None or index > 0:
            return None
        return tuple(request.prompt_logprobs.get(position) for position in range(request.num_prompt_tokens))

    @staticmethod
    def _open(request: Request, outputs: Outputs) -> None:
        if not request.opened:
            request.opened = True
            outputs.opens.append(request.open_text())
