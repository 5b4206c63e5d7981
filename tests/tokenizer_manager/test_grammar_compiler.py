"""Grammars are tried out in a process that can be killed: what kills it is that one request's error."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import vibe_sgl_lite
from vibe_sgl_lite.runtime.errors import RequestError
from vibe_sgl_lite.runtime.text.grammar import GrammarSource
from vibe_sgl_lite.tokenizer_manager import grammar_compiler
from vibe_sgl_lite.tokenizer_manager.grammar_compiler import CompilerArgs, GrammarCompiler

TINY = Path(vibe_sgl_lite.__file__).parent / "models" / "tiny" / "tokenizer.json"
FINE = GrammarSource("choice", ("yes", "no"))


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(CompilerArgs(str(TINY), 2048, (2041,)))
    compiler.compile(FINE)
    yield compiler
    compiler.close()


def chain(length: int) -> str:
    steps = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(length)}
    return json.dumps({"$ref": "#/$defs/a0", "$defs": steps | {f"a{length}": {"type": "string"}}})


def nested(key: str, depth: int) -> str:
    return f'{{"{key}": [' * depth + "{}" + "]}" * depth


def doubling(depth: int) -> str:
    """Each definition names the next one twice."""
    steps = {f"a{i}": {"oneOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(depth)}
    return json.dumps({"$ref": "#/$defs/a0", "$defs": steps | {f"a{depth}": {"type": "string"}}})


HARD = {
    "references": GrammarSource("json_schema", chain(2500)),
    "anyOf": GrammarSource("json_schema", nested("anyOf", 1500)),
    "allOf": GrammarSource("json_schema", nested("allOf", 1500)),
    "deep arrays": GrammarSource("json_schema", '{"items": ' * 20_000 + "{}" + "}" * 20_000),
    "doubling": GrammarSource("json_schema", doubling(40)),
    "stars": GrammarSource("regex", ".*" * 8000),
    "optional": GrammarSource("regex", "a?" * 3000 + "a" * 3000),
}


@pytest.mark.parametrize("name", HARD)
def test_what_breaks_the_library_is_refused_by_name(compiler: GrammarCompiler, name: str) -> None:
    source = HARD[name]
    start = time.monotonic()
    with pytest.raises(RequestError, match=source.field) as caught:
        compiler.compile(source)
    assert time.monotonic() - start < 5
    assert caught.value.field == source.field
    assert len(str(caught.value)) < 500
    assert compiler.compile(GrammarSource("regex", f"[a-z]+{len(name)}"))


def test_what_takes_a_second_is_ended_by_its_cpu_time(compiler: GrammarCompiler) -> None:
    with pytest.raises(RequestError, match="takes longer than"):
        compiler.compile(HARD["stars"])


def test_a_grammar_is_compiled_once(compiler: GrammarCompiler) -> None:
    source = GrammarSource("json_schema", json.dumps({"enum": [f"value {i}" for i in range(2000)]}))
    first = compiler.compile(source)
    start = time.monotonic()
    assert all(compiler.compile(source) == first for _ in range(100))
    assert time.monotonic() - start < 5


def test_the_process_is_started_anew(compiler: GrammarCompiler) -> None:
    assert compiler._process is not None
    process = psutil.Process(compiler._process.pid)
    process.kill()
    for attempt in range(2):  # at most the request that meets the death fails
        try:
            assert compiler.compile(GrammarSource("choice", ("maybe",)))
            break
        except RequestError:
            assert attempt == 0


def test_one_that_starts_too_slowly_answers_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its word that it is ready is not taken for the next grammar's answer, nor each answer for the one after it."""
    compiler = GrammarCompiler(CompilerArgs(str(TINY), 2048, (2041,)))
    with monkeypatch.context() as patch:
        patch.setattr(grammar_compiler, "START_S", 0.0)
        with pytest.raises(RuntimeError, match="did not start"):
            compiler.compile(FINE)
    assert "maybe" in compiler.compile(GrammarSource("choice", ("maybe",)))
    assert "never" in compiler.compile(GrammarSource("choice", ("never",)))
    compiler.close()


def test_several_threads(compiler: GrammarCompiler) -> None:
    seen: list[str] = []

    def work(number: int) -> None:
        seen.append(compiler.compile(GrammarSource("choice", (f"n{number}",))))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == 8


def test_closing_leaves_no_process() -> None:
    compiler = GrammarCompiler(CompilerArgs(str(TINY), 2048, (2041,)))
    compiler.compile(FINE)
    assert compiler._process is not None
    process = psutil.Process(compiler._process.pid)
    compiler.close()
    assert not process.is_running()


def test_it_ends_with_its_standard_input() -> None:
    """So it does not outlive a tokenizer manager that is killed."""
    compiler = GrammarCompiler(CompilerArgs(str(TINY), 2048, (2041,)))
    compiler.compile(FINE)
    process = compiler._process
    assert process is not None
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(30) == 0
