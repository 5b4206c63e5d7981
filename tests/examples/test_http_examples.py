"""The examples that talk HTTP, as their users run them."""

from __future__ import annotations

import http.server
import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from examples.batch import read_requests
from tests.browser.chromium import PATH, Browser
from tests.examples.test_examples import ROOT, environment
from tests.http_server.server import Server, serving
from tests.integration.test_embeddings import make_folder

EXAMPLES = ROOT / "examples"
PATIENCE_S = 60.0


def command(server: Server, name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(EXAMPLES / name), "--base-url", f"{server.url}/v1", *arguments]


def run(server: Server, name: str, *arguments: str, code: int = 0) -> list[str]:
    done = subprocess.run(
        command(server, name, *arguments),
        capture_output=True, text=True, timeout=120, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("question", "call", "answer"),
    [
        (
            "What is the weather in Paris?",
            r'get_weather\(\{"city":"Paris"\}\) -> \{"weather": "sunny", "degrees": 21\}',
            "It is sunny in Paris, 21 degrees.",
        ),
        (
            "What is the weather in Oslo?",
            r"""get_weather\(\{"city":"Oslo"\}\) -> \{"error": "KeyError: 'Oslo'"\}""",
            "",
        ),
    ],
)
def test_agent(server: Server, question: str, call: str, answer: str) -> None:
    """The call, what came of it, and an answer that has it: of a tool that failed, whatever this small model says."""
    lines = run(server, "agent.py", question)
    found = re.fullmatch(call, lines[0])
    assert found, lines
    assert len(lines) == 2
    assert not answer or lines[1] == answer


def test_extract(server: Server) -> None:
    assert run(server, "extract.py", "name Anna, age 31, colour blue", "name Frank, colour green") == [
        "'name Anna, age 31, colour blue' -> Person(name='Anna', age=31, colour='blue')",
        "'name Frank, colour green' -> Person(name='Frank', age=0, colour='green'), not in the text: age",
    ]


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


class FewAnswers(http.server.BaseHTTPRequestHandler):
    """Hands the first requests on to an engine, and leaves the others without an answer."""

    target: Server
    left: threading.Semaphore
    over: threading.Event

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.left.acquire()
        if self.over.is_set():
            self.close_connection = True
            return
        reply = self.target.post(self.path, json.loads(body))
        self.send_response(reply.status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(reply.data)))
        self.end_headers()
        self.wfile.write(reply.data)

    def log_message(self, *_: object) -> None:
        pass


def test_batch_answers_each_line_once_however_often_it_is_killed(server: Server, tmp_path: Path) -> None:
    asked, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bodies = {
        f"sum {i}": {
            "messages": [{"role": "user", "content": f"What is {i} + 25?"}],
            "max_tokens": 60,
            "temperature": 0,
        }
        for i in range(12)
    }
    bodies["bad"] = {"messages": [], "temperature": -1}
    asked.write_text(
        "".join(
            json.dumps({"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}) + "\n"
            for name, body in bodies.items()
        )
    )
    left, over = threading.Semaphore(5), threading.Event()
    handler = type("Handler", (FewAnswers,), {"target": server, "left": left, "over": over})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as between:
        between.daemon_threads = True
        threading.Thread(target=between.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{between.server_address[1]}/v1"
        line = command(server, "batch.py", "--base-url", url, str(asked), str(answers))
        with subprocess.Popen(line, stdout=subprocess.PIPE, env=environment()) as first:
            deadline = time.monotonic() + PATIENCE_S
            while len(lines_of(answers)) < 5:
                assert time.monotonic() < deadline
                assert first.poll() is None
                time.sleep(0.02)
            second = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False, env=environment())
            assert second.returncode == 1, "two jobs wrote into one file"
            assert second.stderr == f"another job is writing to {answers}\n"
            first.send_signal(signal.SIGKILL)
        over.set()
        left.release(100)
        between.shutdown()
    before = lines_of(answers)
    assert len(before) == 5
    answers.write_bytes(b"".join(before) + before[0][:20])  # killed in the middle of a write
    assert run(server, "batch.py", str(asked), str(answers)) == [
        "13 requests, 5 answered before",
        "8 answered now, 0 left",
    ]
    after = lines_of(answers)
    assert after[:5] == before
    found = {line["custom_id"]: line for line in map(json.loads, after)}
    assert len(after) == len(found) == 13
    assert found["bad"]["response"]["status_code"] == 400
    assert "temperature" in found["bad"]["error"]["message"]
    for i in (0, 7):
        body = found[f"sum {i}"]["response"]["body"]
        assert body["choices"] == server.post("/v1/chat/completions", bodies[f"sum {i}"]).json["choices"]
    assert run(server, "batch.py", str(asked), str(answers))[-1] == "0 answered now, 0 left"
    assert lines_of(answers) == after


def test_batch_leaves_open_what_no_server_answers(server: Server, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"custom_id": "a", "url": "/v1/completions", "body": {}}\n')
    out = tmp_path / "out.jsonl"
    nobody = ("--base-url", "http://127.0.0.1:1/v1", "--max-retries", "0")
    lines = run(server, "batch.py", *nobody, str(tmp_path / "in.jsonl"), str(out), code=1)
    assert lines[-1] == "0 answered now, 1 left: run it again"
    assert out.read_bytes() == b""


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            2 * '{"custom_id": "a", "url": "/v1/completions", "body": {}}\n',
            "in.jsonl:2: custom_id 'a' was there before",
        ),
        ('\n{"custom_id": "a", "url": ', "in.jsonl:2 is no request with custom_id, url and body: JSONDecodeError"),
        ("{}", "in.jsonl:1 is no request with custom_id, url and body: KeyError('custom_id')"),
    ],
)
def test_batch_takes_no_bad_file(tmp_path: Path, content: str, problem: str) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=re.escape(problem)):
        read_requests(file)


@pytest.mark.parametrize(
    ("question", "lines"),
    [
        ("What is boat?", ["from: The lists of the harbour. boat: 15, net: 8, anchor: 6.", "15"]),
        ("What is spoon?", ["from: The lists of the kitchen. cup: 4, plate: 12, spoon: 9.", "9"]),
    ],
)
def test_rag(server: Server, question: str, lines: list[str]) -> None:
    assert run(server, "rag.py", question) == lines


@pytest.mark.slow
def test_rag_with_a_reranker(server: Server, tmp_path: Path) -> None:
    """Of random weights: its order is its scores' own, whatever they are."""
    documents = tmp_path / "documents"
    documents.write_text("\n".join(f"thing{i}: {i}." for i in range(30)))
    with serving("--model-path", str(make_folder(tmp_path))) as reranker:
        lines = run(
            server, "rag.py", "--rerank-url", f"{reranker.url}/v1", "--documents", str(documents), "--candidates", "8",
            "What is thing3?",
        )  # fmt: skip
    ranked = [line.split("  ") for line in lines[:8]]
    scores = [float(score) for score, _ in ranked]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)
    assert [text for _, text in ranked if text == "thing3: 3."] == ["thing3: 3."]
    assert lines[8] == f"from: {ranked[0][1]}"


@pytest.mark.skipif(PATH is None, reason="there is no Chromium (apt install chromium)")
def test_chat_page(server: Server, pages: str) -> None:
    ask = "$('prompt').value = {!r}; $('form').requestSubmit()".replace("$", "document.getElementById")
    texts = "[...document.querySelectorAll('.assistant .text')].map(e => e.textContent)"
    with Browser() as browser:
        browser.open(f"{pages}/chat.html?base={server.url}/v1")
        browser.wait("!!document.getElementById('form')", "the page", PATIENCE_S)
        browser.run(ask.format("What is 17 + 25?"))
        browser.wait("document.querySelector('.assistant .thinking')?.textContent", "thinking", PATIENCE_S)
        browser.wait(f"{texts}[0] === '42' && document.getElementById('stop').disabled", "the answer", PATIENCE_S)
        browser.run(ask.format("My name is Ben."))
        browser.wait(f"{texts}[1] && document.getElementById('stop').disabled", "a second answer", PATIENCE_S)
        browser.run(ask.format("What is my name?"))
        browser.wait(f"{texts}[2] === 'Your name is Ben.'", "an answer from what was said before", PATIENCE_S)
        assert browser.console == []


@pytest.mark.skipif(PATH is None, reason="there is no Chromium (apt install chromium)")
def test_chat_page_shows_errors(server: Server, pages: str) -> None:
    with Browser() as browser:
        browser.open(f"{pages}/chat.html?base={server.url}/nothing")
        browser.wait("!!document.getElementById('form')", "the page", PATIENCE_S)
        browser.run("document.getElementById('prompt').value = 'Hi'; document.getElementById('form').requestSubmit()")
        assert browser.wait("document.querySelector('.error')?.textContent", "the error", PATIENCE_S)
        assert not browser.run("document.getElementById('send').disabled")
