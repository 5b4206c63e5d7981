"""The scheduler process's neighbours, played by a test over real sockets."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import zmq

from tests.scheduler.fake_rank import FakeRank
from vibe_sgl_lite.runtime.launcher.child import PipelineSpec
from vibe_sgl_lite.runtime.messages import (
    ChildMessage,
    ChildReady,
    DetokenizerInput,
    ForwardBatch,
    LauncherMessage,
    NewScheduler,
    OpenText,
    RankInput,
    RankReady,
    Shutdown,
    StepOutput,
    TokenizerInput,
    TokenOutput,
)
from vibe_sgl_lite.runtime.settings.model_config import GenerationDefaults, ModelConfig
from vibe_sgl_lite.runtime.settings.server_args import ServerArgs
from vibe_sgl_lite.runtime.transport.channels import Receiver, Sender, bind_ipc
from vibe_sgl_lite.runtime.transport.endpoints import Endpoints

NUM_PAGES = 32


class Neighbours:
    """Every process around the scheduler, in one thread."""

    def __init__(self, folder: str, **args: Any) -> None:
        model = ModelConfig(
            architecture="Qwen3ForCausalLM", vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4,
            max_position_embeddings=512, tie_word_embeddings=True, dtype="float32", initializer_range=0.02,
            eos_token_ids=(), bos_token_id=None, generation_defaults=GenerationDefaults(),
        )  # fmt: skip
        endpoints = Endpoints(directory=folder, api=f"ipc://{folder}/api")
        spec = PipelineSpec(
            args=ServerArgs(page_size=4, max_running_requests=4, **args), endpoints=endpoints, model=model,
            model_name="m", model_folder=folder, tokenizer_folder=folder, context_length=512, chunked_prefill_size=16,
            page_size=4, device="cpu", dtype="float32", epoch="e",
        )  # fmt: skip
        self.endpoints = endpoints
        path = Path(folder) / "spec.json"
        path.write_bytes(msgspec.json.encode(spec))
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.control = self.context.socket(zmq.ROUTER)
        bind_ipc(self.control, endpoints.control)
        self.commands = msgspec.msgpack.Decoder(ChildMessage)
        self.tokenizer: Receiver[TokenizerInput] = Receiver(self.context, endpoints.tokenizer_manager, TokenizerInput)
        self.detokenizer: Receiver[DetokenizerInput] = Receiver(self.context, endpoints.detokenizer, DetokenizerInput)
        self.batches: Receiver[RankInput] = Receiver(self.context, endpoints.rank(0), RankInput)
        self.inputs = Sender(self.context, endpoints.scheduler)
        self.results = Sender(self.context, endpoints.results)
        self.rank = FakeRank(NUM_PAGES, 4, 4)
        self.process = subprocess.Popen([sys.executable, "-m", "vibe_sgl_lite.scheduler.process", str(path)])

    def control_message(self, kind: type, timeout_s: float = 10.0) -> Any:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.control.poll(100):
                message = self.commands.decode(self.control.recv_multipart()[1])
                if isinstance(message, kind):
                    return message
        raise AssertionError(f"no {kind.__name__}")

    def restart_ranks(self, epoch: int) -> None:
        """The ranks of `epoch` take over; what the old ones have sent is on its way still."""
        self.batches.close()
        self.rank = FakeRank(NUM_PAGES, 4, 4, epoch=epoch)
        self.batches = Receiver(self.context, self.endpoints.of_epoch(epoch).rank(0), RankInput)

    def tell(self, message: LauncherMessage) -> None:
        self.control.send_multipart([b"scheduler", msgspec.msgpack.encode(message)])

    def become_ready(self) -> ChildReady:
        self.results.send(RankReady(NUM_PAGES, "cpu", "float32", self.rank.epoch))
        ready = self.control_message(ChildReady)
        assert isinstance(ready, ChildReady)
        return ready

    def run_rank(self, until_finished: int) -> tuple[list[OpenText], list[TokenOutput]]:
        """Answer steps until so many samples have ended. `first` of an output is -1 where it is not told."""
        opens: list[OpenText] = []
        outputs: list[TokenOutput] = []
        deadline = time.monotonic() + 10
        while sum(output.finish is not None for output in outputs) < until_finished:
            assert time.monotonic() < deadline
            batch = self.batches.receive(0.01)
            if batch is not None:
                assert isinstance(batch, ForwardBatch)
                self.results.send(self.rank.run(batch))
            for message in self.detokenizer.drain():
                if isinstance(message, OpenText):
                    opens.append(message)
                elif not isinstance(message, NewScheduler):
                    assert isinstance(message, StepOutput)
                    outputs += message.outputs
                    outputs += [TokenOutput(uid, -1, token) for uid, token in message.next_tokens]
        return opens, outputs

    def reply(self) -> TokenizerInput:
        message = self.tokenizer.receive(5)
        assert message is not None
        return message

    def shut_down(self) -> int:
        self.tell(Shutdown())
        return self.process.wait(timeout=10)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.context.destroy(linger=0)
