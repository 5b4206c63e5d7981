"""Real processes of the text side, between a launcher, a scheduler and clients that the tests play."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import zmq

from tests.detokenizer.corpus import small_backend
from vibe_sgl_lite.runtime.launcher.child import PipelineSpec
from vibe_sgl_lite.runtime.messages import (
    PROTOCOL,
    AbortRequest,
    AddRequest,
    ChildMessage,
    ChildReady,
    Chunk,
    Chunks,
    Drained,
    ErrorInfo,
    Finish,
    Generate,
    Hello,
    LauncherMessage,
    OpenText,
    Ping,
    Query,
    QueryReply,
    RequestRejected,
    SchedulerInput,
    SchedulerQuery,
    SchedulerReply,
    ServerMessage,
    Shutdown,
    StepOutput,
    StopMatched,
    TokenOutput,
    Usage,
    Welcome,
    pack_ids,
    unpack_ids,
)
from vibe_sgl_lite.runtime.settings.model_config import GenerationDefaults, ModelConfig
from vibe_sgl_lite.runtime.settings.server_args import ServerArgs
from vibe_sgl_lite.runtime.transport.channels import Receiver, Sender
from vibe_sgl_lite.runtime.transport.endpoints import Endpoints
from vibe_sgl_lite.tokenizer_manager.manager import ABOUT_POOL

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 512
CONTEXT = 4096
TEMPLATE = (
    "{% if tools %}T{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>{% endif %}{% endif %}"
)


def make_spec(folder: Path, **args: Any) -> PipelineSpec:
    """`folder`: short, for ipc paths; gets the tokenizer's files."""
    small_backend().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    model = ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        dtype="float32",
        initializer_range=0.02,
        eos_token_ids=(2, 0),
        bos_token_id=None,
        generation_defaults=GenerationDefaults(temperature=0.6, top_k=20, top_p=0.95),
    )
    return PipelineSpec(
        args=ServerArgs(**args),
        endpoints=Endpoints(directory=str(folder), api=f"ipc://{folder}/api"),
        model=model,
        model_name="small",
        model_folder=str(folder),
        tokenizer_folder=str(folder),
        context_length=CONTEXT,
        chunked_prefill_size=512,
        page_size=16,
        device="cpu",
        dtype="float32",
        epoch="e1",
    )


class Launcher:
    """Starts the processes; the other end of their control lines."""

    def __init__(self, spec: PipelineSpec, names: tuple[str, ...]) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self.context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(spec.endpoints.control)
        self._decoder: msgspec.msgpack.Decoder[ChildMessage] = msgspec.msgpack.Decoder(ChildMessage)
        spec_file = Path(spec.endpoints.directory) / "spec.json"
        spec_file.write_bytes(msgspec.json.encode(spec))
        self.heard: list[ChildMessage] = []
        self.processes = {
            name: subprocess.Popen([sys.executable, "-m", f"{name}.process", str(spec_file)], cwd=ROOT)
            for name in names
        }

    def wait_for(self, kind: type[Any], count: int = 1, timeout_s: float = 30.0) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        while True:
            found = [message for message in self.heard if isinstance(message, kind)]
            if len(found) >= count:
                return found
            left = deadline - time.monotonic()
            assert left > 0, f"{len(found)} of {count} {kind.__name__}"
            if self._socket.poll(int(left * 1000) + 1):
                self.heard.append(self._decoder.decode(self._socket.recv_multipart()[1]))

    def tell(self, name: str, message: LauncherMessage) -> None:
        self._socket.send_multipart([name.encode(), msgspec.msgpack.encode(message)])

    def close(self) -> None:
        for name, process in self.processes.items():
            if process.poll() is None:
                self.tell(name, Shutdown())
        try:
            for process in self.processes.values():
                process.wait(10)
        finally:
            for process in self.processes.values():
                process.kill()
                process.wait()
            self._socket.close()
            self.context.destroy(linger=0)


class FakeScheduler:
    """Echoes each prompt, a token a step, in a thread. Behaviour is set by the attributes, at any time.

    hold: take requests and generate nothing for them. reject: with this error. mute: leave questions unanswered.
    repeat: the echo starts again this often.
    """

    def __init__(self, spec: PipelineSpec) -> None:
        self.hold = False
        self.mute = False
        self.reject: ErrorInfo | None = None
        self.flush_error: ErrorInfo | None = None
        self.repeat = 1
        self.pause_s = 0.0
        self.heard: list[SchedulerInput] = []
        self._spec = spec
        self._open: dict[int, list[int]] = {}
        self._given: dict[int, int] = {}
        self._prompts: dict[int, int] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()

    def wait_for(
        self, kind: type[Any], test: Callable[[Any], bool] = lambda message: True, timeout_s: float = 5
    ) -> Any:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for message in list(self.heard):
                if isinstance(message, kind) and test(message):
                    return message
            time.sleep(0.005)
        raise AssertionError(f"no {kind.__name__} came")

    def added(self, rid: str) -> AddRequest:
        message: AddRequest = self.wait_for(AddRequest, lambda message: message.rid == rid)
        return message

    def aborted(self, uid: int, timeout_s: float = 5) -> None:
        self.wait_for(AbortRequest, lambda message: message.uid == uid, timeout_s)

    def _run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        receiver: Receiver[SchedulerInput] = Receiver(context, self._spec.endpoints.scheduler, SchedulerInput)
        manager = Sender(context, self._spec.endpoints.tokenizer_manager)
        detokenizer = Sender(context, self._spec.endpoints.detokenizer)
        while not self._stopping.is_set():
            receiver.socket.poll(0 if self._open else 20)
            for message in receiver.drain():
                self._take(message, manager, detokenizer)
                self.heard.append(message)
            outputs = [self._next(uid) for uid in list(self._open)]
            if outputs:
                detokenizer.send(StepOutput(outputs))
                time.sleep(self.pause_s)
        for channel in (receiver, manager, detokenizer):
            channel.close()
        context.destroy(linger=0)

    def _take(self, message: SchedulerInput, manager: Sender, detokenizer: Sender) -> None:
        match message:
            case AddRequest() if self.reject is not None:
                manager.send(RequestRejected(message.uid, self.reject))
            case AddRequest(uid=uid, sampling=sampling):
                ids = unpack_ids(message.token_ids)
                options = OpenText(
                    uid, message.rid, 0, len(ids), sampling.stop, sampling.include_stop, sampling.skip_special_tokens
                )
                detokenizer.send(options)
                self._given[uid], self._prompts[uid] = 0, len(ids)
                if not self.hold:
                    self._open[uid] = ids * self.repeat
            case AbortRequest(uid=uid) if uid in self._given:
                self._open.pop(uid, None)
                given = self._given.pop(uid)
                usage = Usage(self._prompts[uid], given)
                detokenizer.send(StepOutput([TokenOutput(uid, given, b"", finish=Finish("abort"), usage=usage)]))
            case StopMatched(uid=uid):
                self._open.pop(uid, None)
                self._given.pop(uid, None)
            case SchedulerQuery() if not self.mute:
                error = self.flush_error if message.what == "flush_cache" else None
                values: dict[str, int | float | str | bool] = {"num_running": len(self._open)}
                if message.qid == ABOUT_POOL:
                    values["kv_pages_total"] = 1000
                manager.send(SchedulerReply(message.qid, {} if error else values, error))

    def _next(self, uid: int) -> TokenOutput:
        ids, first = self._open[uid], self._given[uid]
        self._given[uid] += 1
        finish = usage = None
        if first + 1 == len(ids):
            del self._open[uid]
            finish, usage = Finish("length"), Usage(self._prompts[uid], first + 1, 1)
        return TokenOutput(uid, first, pack_ids([ids[first]]), finish=finish, usage=usage)


class RawClient:
    """A DEALER with nothing around it: says what it is told, when it is told."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], address: str, *, hello: bool = True, hwm: int = 0
    ) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        if hwm:
            self.socket.setsockopt(zmq.RCVHWM, hwm)
        self.socket.connect(address)
        self._decoder: msgspec.msgpack.Decoder[ServerMessage] = msgspec.msgpack.Decoder(ServerMessage)
        self._chunks: deque[Chunk] = deque()  # of the last message
        self.welcome: Welcome | None = None
        if hello:
            self.send(Hello(PROTOCOL, "test"))
            message = self.receive()
            assert isinstance(message, Welcome)
            self.welcome = message

    def send(self, message: msgspec.Struct) -> None:
        self.socket.send(msgspec.msgpack.encode(message))

    def generate(self, rid: str, prompt: str | None = None, **fields: Any) -> None:
        sampling = msgspec.Raw(msgspec.msgpack.encode(fields.pop("sampling", {})))
        given: dict[str, Any] = {"prompt": prompt, "input_ids": None, "messages": None} | fields
        self.send(Generate(rid=rid, sampling=sampling, **given))

    def receive(self, timeout_s: float = 5.0) -> ServerMessage:
        if not self._chunks:
            assert self.socket.poll(int(timeout_s * 1000)), "nothing came"
            message = self._decoder.decode(self.socket.recv())
            if not isinstance(message, Chunks):
                return message
            self._chunks.extend(message.chunks)
        return self._chunks.popleft()

    def receive_for(self, seconds: float) -> list[ServerMessage]:
        """What comes within that time, pinging meanwhile."""
        messages: list[ServerMessage] = []
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.send(Ping())
            while self.socket.poll(int(min(left, 0.3) * 1000)):
                messages.append(self.receive())
                messages += self._chunks
                self._chunks.clear()
                if time.monotonic() > end:
                    break
        return messages

    def finish(self, rid: str, timeout_s: float = 30.0) -> list[Chunk]:
        """Chunks of `rid` up to its end; other messages are passed over."""
        chunks: list[Chunk] = []
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            message = self.receive(deadline - time.monotonic())
            if isinstance(message, Chunk) and message.rid == rid:
                chunks.append(message)
                if message.finish is not None:
                    return chunks
        raise AssertionError(f"{rid} did not end")

    def close(self) -> None:
        self.socket.close()


class TextSide:
    """The running processes and everything around them."""

    def __init__(self, spec: PipelineSpec, names: tuple[str, ...]) -> None:
        self.spec = spec
        self.launcher = Launcher(spec, names)
        self.scheduler = FakeScheduler(spec)
        self._clients: list[RawClient] = []

    def client(self, **options: Any) -> RawClient:
        client = RawClient(self.launcher.context, self.spec.endpoints.api, **options)
        self._clients.append(client)
        return client

    def drained(self, timeout_s: float = 5.0) -> None:
        self.launcher.wait_for(Drained, timeout_s=timeout_s)

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self.scheduler.close()
        self.launcher.close()


def stats(client: RawClient) -> dict[str, Any]:
    client.send(Query(1, "stats"))
    while True:
        reply = client.receive()
        if isinstance(reply, QueryReply):
            assert reply.error is None
            return reply.values


@contextmanager
def text_side(*names: str, **args: Any) -> Iterator[TextSide]:
    """`names`: the processes to run, both by default. `args`: the engine's settings."""
    with tempfile.TemporaryDirectory(prefix="vsl", dir="/tmp" if os.path.isdir("/tmp") else None) as folder:
        processes = names or ("tokenizer_manager", "detokenizer")
        side = TextSide(make_spec(Path(folder), **args), processes)
        try:
            side.launcher.wait_for(ChildReady, len(processes))
            yield side
        finally:
            side.close()
