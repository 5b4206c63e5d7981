"""Grammars are tried out in a process of their own before anything that serves others follows them.

The grammar library is native code: an input of 88 KB can overflow its stack, and others take minutes or gigabytes.
`python -m vibe_sgl_lite.tokenizer_manager.grammar_compiler` reads the tokenizer once and forks for each grammar; a fork
has a limit of CPU time, memory and stack, and what kills it is that request's error. It ends with its standard input.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from typing import IO, NoReturn

import msgspec

from vibe_sgl_lite.runtime.errors import RequestError
from vibe_sgl_lite.runtime.text.grammar import GrammarSource, added_tokens, compile_grammar, make_tokenizer

CPU_S = 0.4  # for one grammar; a rank takes about as long for it, once
WALL_S = 20.0  # a busy machine
MEMORY_BYTES = 256 * 1024**2  # on top of what the process has
START_S = 60.0
NICENESS = 5  # tokens come first
CACHED = 64  # grammars
_LENGTH = struct.Struct("<I")


class CompilerArgs(msgspec.Struct, frozen=True):
    tokenizer_file: str
    vocab_size: int
    end_token_ids: tuple[int, ...]


class _Result(msgspec.Struct, frozen=True):
    """One of the two is set."""

    grammar: str | None = None
    error: str | None = None


class GrammarCompiler:
    """Starts the process when it is first needed, and anew if it has died. Safe to use from several threads."""

    def __init__(self, args: CompilerArgs) -> None:
        self._args = args
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._done: OrderedDict[GrammarSource, str] = OrderedDict()

    def compile(self, source: GrammarSource) -> str:
        """The grammar. Raises RequestError for one that cannot be followed, or not within the limits."""
        with self._lock:
            grammar = self._done.pop(source, None)
            if grammar is None:
                grammar = self._ask(source)
            self._done[source] = grammar
            while len(self._done) > CACHED:
                self._done.popitem(last=False)
            return grammar

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _ask(self, source: GrammarSource) -> str:
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            _write(self._process.stdin, msgspec.msgpack.encode(source))
            frame = _read(self._process.stdout, 2 * WALL_S)
        except OSError:
            frame = None
        if frame is None:
            self._stop()
            raise RequestError(f"{source.field} could not be tried out: its process died", field=source.field)
        result = msgspec.msgpack.decode(frame, type=_Result)
        if result.grammar is None:
            raise RequestError(result.error or "", field=source.field)
        return result.grammar

    def _start(self) -> None:
        self._stop()
        command = [sys.executable, "-P", "-m", "vibe_sgl_lite.tokenizer_manager.grammar_compiler"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        _write(self._process.stdin, msgspec.msgpack.encode(self._args))
        if _read(self._process.stdout, START_S) is None:
            self._stop()  # its word that it is ready, which may still come, would be taken for an answer
            raise RuntimeError("the process that tries grammars out did not start")

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        self._process = None


def main() -> None:
    """Standard input: `CompilerArgs`, then one `GrammarSource` after the other; output: b"", then a `_Result` each."""
    frames, replies = sys.stdin.buffer, sys.stdout.buffer
    first = _read(frames, None)
    if first is None:
        return
    args = msgspec.msgpack.decode(first, type=CompilerArgs)
    os.nice(NICENESS)
    text = Path(args.tokenizer_file).read_text(encoding="utf-8")
    tokenizer = make_tokenizer(text, args.vocab_size, args.end_token_ids)
    added = added_tokens(text, args.end_token_ids)
    _write(replies, b"")
    while (frame := _read(frames, None)) is not None:
        source = msgspec.msgpack.decode(frame, type=GrammarSource)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _limit()
            try:
                result = _Result(grammar=compile_grammar(source, tokenizer, added))
            except RequestError as error:
                result = _Result(error=str(error))
            except MemoryError:
                result = _Result(error=f"{source.field} takes too much memory: make it simpler")
            _leave(writer, result)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            answer = _read(pipe, WALL_S)
        if answer is None:
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        _write(replies, answer or msgspec.msgpack.encode(_Result(error=_why(source.field, status))))


def _limit() -> None:
    """Of this fork. The timer's signal ends it inside native code too."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    os.close(0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # native code tells of its overflow there
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _leave(writer: int, result: _Result) -> NoReturn:
    with os.fdopen(writer, "wb") as pipe:
        _write(pipe, msgspec.msgpack.encode(result))
    os._exit(0)


def _why(field: str, status: int) -> str:
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number in (signal.SIGPROF, signal.SIGKILL):
        return f"{field} takes longer than {CPU_S:g} s to prepare: make it simpler"
    if number in (signal.SIGSEGV, signal.SIGBUS):
        return f"{field} is nested too deeply, or refers too often from one part to the next: flatten it"
    return f"{field} takes more than {MEMORY_BYTES >> 20} MiB to prepare: make it simpler"


def _write(pipe: IO[bytes], frame: bytes) -> None:
    pipe.write(_LENGTH.pack(len(frame)) + frame)
    pipe.flush()


def _read(pipe: IO[bytes], timeout_s: float | None) -> bytes | None:
    """One frame; None at the end of the pipe and when nothing comes for `timeout_s`."""
    if timeout_s is not None and not select.select([pipe], [], [], timeout_s)[0]:
        return None
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    size = _LENGTH.unpack(head)[0]
    frame = pipe.read(size)
    return frame if len(frame) == size else None


if __name__ == "__main__":
    main()
