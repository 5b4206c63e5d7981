"""The detokenizer without its sockets: opened samples and step outputs in, encoded chunks and stop matches out.

In chats, thinking blocks and tool calls are taken out of the text, behind the stop strings: these match on all of it.

On a stop string the sample ends here: its last chunk is made with ids, logprobs and usage cut at the token that
completed the match, and whatever the scheduler still sends for it is dropped. Repeated tokens are dropped by `first`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import msgspec

from vibe_sgl_lite.detokenizer.chat_parser import ChatParser, Parsed
from vibe_sgl_lite.detokenizer.incremental import Vocabulary
from vibe_sgl_lite.detokenizer.stop import StopMatcher
from vibe_sgl_lite.runtime.messages import (
    Chunk,
    ChunkBatch,
    Finish,
    LogprobEntry,
    OpenText,
    RoutedChunk,
    StepOutput,
    StopMatched,
    TokenLogprob,
    TokenOutput,
    Usage,
    unpack_ids,
)
from vibe_sgl_lite.runtime.text.tokenizer import Tokenizer

ID_BYTES = 4  # of a token id in a message

log = logging.getLogger(__name__)


class _Sample:
    """One open sample. `stop_specials`: stop strings that are special tokens, by id, which the text leaves out and a
    match must not miss. `count`: tokens received so far. `cached`: prompt tokens that came from the radix cache.
    `length`: characters decoded so far. `version`: of the weights, as the client was told."""

    __slots__ = ("cached", "chat", "count", "length", "options", "stop", "stop_specials", "stream", "version")

    def __init__(self, options: OpenText, vocabulary: Vocabulary) -> None:
        self.options = options
        self.stream = vocabulary.open(options.skip_special_tokens)
        self.stop = StopMatcher(options.stop, options.include_stop) if options.stop else None
        self.stop_specials = {i: stop for stop in options.stop if (i := vocabulary.special_id(stop)) is not None}
        self.chat = None if options.text_format is None else ChatParser(options.text_format)
        self.count = 0
        self.length = 0
        self.cached = options.cached_tokens
        self.version: str | None = None

    def add(self, ids: Sequence[int], offsets: list[int] | None, hidden: int | None) -> tuple[str, int, str | None]:
        """(text to show, how many of `ids` count, the stop string found). Ids behind a match do not count.

        offsets: to be filled with the characters decoded before each of the ids; None when nobody asks. hidden: the
        token that ended the sample, the last one, when it is no part of the text.
        """
        if self.stop is None and offsets is None:
            text = self.stream.add(ids if hidden is None else ids[:-1])
            self.length += len(text)
            return text, len(ids), None
        pieces: list[str] = []
        for used, token_id in enumerate(ids, 1):
            if offsets is not None:
                offsets.append(self.length)
            if token_id in self.stop_specials:
                return "".join(pieces) + self._end_at(token_id), used, self.stop_specials[token_id]
            if used == len(ids) and token_id == hidden:
                break
            piece = self.stream.add((token_id,))
            self.length += len(piece)
            if self.stop is None:
                pieces.append(piece)
                continue
            shown, matched = self.stop.add(piece)
            pieces.append(shown)
            if matched is not None:
                return "".join(pieces), used, matched
        return "".join(pieces), len(ids), None

    def _end_at(self, token_id: int) -> str:
        """What is left to show before a stop string that is a special token, and this if it is to be shown."""
        assert self.stop is not None
        shown, matched = self.stop.add(self.stream.flush())
        if matched is None:
            shown += self.stop.flush()
        return shown + (self.stop_specials[token_id] if self.options.include_stop else "")

    def end(self) -> tuple[str, str | None]:
        """(the rest of the text, the stop string that it still completed)."""
        rest = self.stream.flush()
        if self.stop is None:
            return rest, None
        shown, matched = self.stop.add(rest)
        return (shown, matched) if matched is not None else (shown + self.stop.flush(), None)


class Detokenizer:
    """late: outputs that came for samples already ended (expected after stop matches). weight_version: of the weights
    that make what comes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.late = 0
        self.weight_version = "default"
        self._vocabulary = Vocabulary(tokenizer)
        self._samples: dict[int, _Sample] = {}
        self._encoder = msgspec.msgpack.Encoder()

    @property
    def num_samples(self) -> int:
        return len(self._samples)

    def open(self, options: OpenText) -> None:
        """Opening a sample that is open changes nothing. What its client has already is not said again: the text after
        k tokens follows from these tokens alone."""
        self.weight_version = options.weight_version
        if options.uid not in self._samples:
            sample = self._samples[options.uid] = _Sample(options, self._vocabulary)
            ids = unpack_ids(options.resume_ids)
            sample.count = len(ids)
            text = sample.add(ids, None, None)[0]
            if sample.chat is not None:
                sample.chat.add(text)

    def forget_all(self) -> None:
        """Who opened the samples is gone."""
        self._samples.clear()

    def step(self, step: StepOutput) -> tuple[ChunkBatch, list[StopMatched]]:
        """Chunks of one step, one a sample that brought something new, and the samples that a stop string ended."""
        chunks: list[RoutedChunk] = []
        matches: list[StopMatched] = []
        for output in (*step.outputs, *self._next_tokens(step)):
            sample = self._samples.get(output.uid)
            if sample is None:
                self.late += 1
                continue
            chunk = self._chunk(sample, output)
            if chunk is None:
                continue
            if chunk.finish is not None:
                del self._samples[output.uid]
                if output.finish is None:
                    matches.append(StopMatched(output.uid))
            payload = self._encoder.encode(chunk)
            chunks.append(RoutedChunk(output.uid, chunk.finish is not None, payload, sample.count))
        return ChunkBatch(chunks), matches

    def _next_tokens(self, step: StepOutput) -> Iterator[TokenOutput]:
        for uid, token in step.next_tokens:
            sample = self._samples.get(uid)
            yield TokenOutput(uid, 0 if sample is None else sample.count, token)

    def _chunk(self, sample: _Sample, output: TokenOutput) -> Chunk | None:
        """None when the output only repeats what came before."""
        repeated = sample.count - output.first
        if repeated < 0:
            log.error("sample %d: token %d came where %d was due", output.uid, output.first, sample.count)
            repeated = 0
            sample.count = output.first
        packed = output.token_ids[ID_BYTES * repeated :] if repeated else output.token_ids
        if output.usage is not None:
            sample.cached = output.usage.cached_tokens
        if not packed and output.finish is None and output.prompt_logprobs is None:
            return None
        ids = memoryview(packed).cast("i")
        offsets: list[int] | None = None if output.logprobs is None else []
        finish = output.finish
        hidden = None  # as in vLLM and SGLang; whether special tokens are shown is skip_special_tokens' to say
        if finish is not None and isinstance(finish.matched, int) and not sample.options.include_stop:
            hidden = None if self._vocabulary.is_special(finish.matched) else finish.matched
        text, used, matched = sample.add(ids, offsets, hidden)
        if matched is None and finish is not None:
            rest, matched = sample.end()
            text += rest
        if matched is not None:
            finish = Finish("stop", matched=matched)
        parsed = Parsed(text) if sample.chat is None else _parse(sample.chat, text, finish is not None)
        logprobs = None
        if output.logprobs is not None and offsets is not None:
            logprobs = self._entries(output.logprobs[repeated : repeated + used], offsets)
        first = sample.count
        sample.count += used
        usage = None
        if finish is not None:
            usage = Usage(sample.options.prompt_tokens, sample.count, sample.cached)
        versions: tuple[tuple[int, str], ...] = ()
        if sample.version != self.weight_version:
            sample.version = self.weight_version
            versions = ((first, self.weight_version),)
        return Chunk(
            sample.options.rid,
            sample.options.index,
            first,
            packed[: ID_BYTES * used],
            parsed.text,
            finish,
            usage,
            logprobs,
            None if output.prompt_logprobs is None else self._prompt_entries(output.prompt_logprobs),
            parsed.reasoning,
            parsed.tool_calls,
            output.pooled,
            versions,
        )

    def _entries(self, logprobs: Sequence[TokenLogprob], offsets: Sequence[int]) -> tuple[LogprobEntry, ...]:
        return tuple(self._entry(entry, offset) for entry, offset in zip(logprobs, offsets, strict=True))

    def _prompt_entries(self, logprobs: Sequence[TokenLogprob | None]) -> tuple[LogprobEntry | None, ...]:
        return tuple(None if entry is None else self._entry(entry) for entry in logprobs)

    def _entry(self, logprob: TokenLogprob, offset: int | None = None) -> LogprobEntry:
        text = self._vocabulary.text
        top = tuple(LogprobEntry(token_id, value, text(token_id)) for token_id, value in logprob.top)
        return LogprobEntry(logprob.token_id, logprob.logprob, text(logprob.token_id), top, offset)


def _parse(chat: ChatParser, text: str, final: bool) -> Parsed:
    new = chat.add(text)
    if final:
        rest = chat.end()
        new = Parsed(new.text + rest.text, new.reasoning + rest.reasoning, new.tool_calls + rest.tool_calls)
    return new
