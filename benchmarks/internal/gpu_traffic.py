r"""Minutes of random traffic on a GPU: whether every token is right, and whether memory stays as it is.

    python benchmarks/internal/gpu_traffic.py --seconds 480
    python benchmarks/internal/gpu_traffic.py --seconds 20 --device cpu

The embedded model in fp32, over a KV cache that is too small for what runs, so that requests are retracted; prompts
that share beginnings, so that prefixes are found. Clients come and go: greedy requests, drawn ones with a seed, ones
that are aborted in the middle, and ones with a grammar. Each token of a greedy or drawn request, of aborted ones too,
is compared with what transformers' logits in fp32 give after all before it: their argmax, or that of their scores with
the noise of model_worker/sampling/noise.py. A token whose score is within --near of the best is told apart from a wrong
one. Documents of a grammar must be what it says. Memory of the rank on the card, as the driver has it, and of all
processes: every 15 s. Prints a line for each look and, last, one JSON line; exits with 1 for a wrong token or document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import queue
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/internal/gpu_traffic.py` finds the packages

from vibe_sgl_lite import LLM, AsyncClient, SamplingParams  # noqa: E402
from vibe_sgl_lite.model_worker.sampling.noise import counters, gumbel, row_keys  # noqa: E402

MODEL = ROOT / "vibe_sgl_lite" / "models" / "tiny"
LONGEST_OUTPUT, CONTEXT = 120, 512
LOOK_S = 15.0
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "count"],
    "additionalProperties": False,
}
REGEX = r"[a-c]{3,9}-[0-9]{2}"
Job = tuple[list[int], list[int], float, int]  # prompt, output, temperature, seed


def is_document(text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    named = isinstance(value, dict) and set(value) == {"name", "count"}
    return named and isinstance(value["name"], str) and len(value["name"]) <= 8 and value["count"] in range(100)


class Oracle:
    """transformers in fp32, in a thread of its own. counts: tokens by what came of them."""

    def __init__(self, device: str, near: float) -> None:
        torch.backends.cuda.matmul.allow_tf32 = False
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        self.model, self.device, self.near = model.to(device).eval(), device, near
        self.counts: Counter[str] = Counter()
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work)
        self.thread.start()

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None:
            with torch.inference_mode():
                self._check(*job)

    def _check(self, prompt: list[int], output: list[int], temperature: float, seed: int) -> None:
        ids = torch.tensor([prompt + output], device=self.device)
        scores = self.model(ids).logits[0, len(prompt) - 1 : -1].double()
        if temperature > 0:
            positions = torch.arange(len(prompt), len(prompt) + len(output), device=self.device)
            keys = row_keys(torch.full_like(positions, seed), positions)
            noise = gumbel(keys[:, None], counters(torch.arange(scores.shape[1], device=self.device)))
            scores = scores / temperature + noise
        got = scores.gather(1, ids[0, len(prompt) :, None])[:, 0]
        for behind in (scores.amax(1) - got).tolist():
            self.counts["right" if behind == 0 else "near" if behind < self.near else "wrong"] += 1


class Traffic:
    def __init__(self, client: AsyncClient, oracle: Oracle, until: float) -> None:
        self.client, self.oracle, self.until = client, oracle, until
        self.counts: Counter[str] = Counter()
        self.choose = random.Random(1)
        self.beginnings = [[self.choose.randrange(2000) for _ in range(150)] for _ in range(6)]

    def prompt(self) -> list[int]:
        choose = self.choose
        ids = [choose.randrange(2000) for _ in range(choose.randint(1, 150))]
        return choose.choice(self.beginnings)[: choose.randint(1, 150)] + ids if choose.random() < 0.5 else ids

    async def user(self) -> None:
        while time.monotonic() < self.until:
            kind = self.choose.choices(("greedy", "drawn", "aborted", "json", "regex"), (4, 4, 2, 1, 1))[0]
            self.counts[kind] += 1
            await (self.constrained(kind) if kind in ("json", "regex") else self.plain(kind))
            if self.choose.random() < 0.1:
                await asyncio.sleep(self.choose.random())

    async def plain(self, kind: str) -> None:
        choose, prompt = self.choose, self.prompt()
        drawn = kind == "drawn" or choose.random() < 0.5
        temperature, seed = (choose.choice((0.5, 0.8, 1.3)), choose.randrange(2**62)) if drawn else (0.0, 0)
        params = SamplingParams(
            temperature=temperature, seed=seed, max_new_tokens=choose.randint(1, LONGEST_OUTPUT), ignore_eos=True,
            top_k=-1, top_p=1.0, min_p=0.0,
        )  # fmt: skip
        stop_after = choose.randint(0, 60) if kind == "aborted" else LONGEST_OUTPUT + 1
        output: list[int] = []
        stream = self.client.stream(input_ids=prompt, sampling_params=params)
        try:
            if stop_after:
                async for chunk in stream:
                    output += chunk.token_ids
                    if len(output) >= stop_after:
                        break
        finally:
            await stream.aclose()
        if kind != "aborted" and len(output) != params.max_new_tokens:
            self.counts["cut short"] += 1
        if output:
            self.oracle.jobs.put((prompt, output, temperature, seed))

    async def constrained(self, kind: str) -> None:
        rule: dict[str, Any] = {"json_schema": SCHEMA} if kind == "json" else {"regex": REGEX}
        params = SamplingParams(temperature=1.0, max_new_tokens=200, seed=self.choose.randrange(2**62))
        output = await self.client.generate(input_ids=self.prompt(), sampling_params=params, **rule)
        if output.finish_reason != "stop":
            self.counts["document not ended"] += 1
        elif not (is_document(output.text) if kind == "json" else re.fullmatch(REGEX, output.text)):
            self.counts["wrong document"] += 1

    async def look(self, began: float) -> list[tuple[int, int]]:
        """MB of the rank on the card (or 0), and of all of our processes; as long as there is traffic."""
        seen = []
        while time.monotonic() < self.until:
            await asyncio.sleep(LOOK_S)
            seen.append((await asyncio.to_thread(card_memory), processes_memory()))
            stats = await self.client.stats()
            print(
                f"{time.monotonic() - began:5.0f} s: card {seen[-1][0]} MB, processes {seen[-1][1]} MB, "
                f"{stats['num_retractions']} retractions, tokens {dict(self.oracle.counts)}, {dict(self.counts)}",
                flush=True,
            )
        return seen


def ranks() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "vibe_sgl_lite.model_worker.process" in p.cmdline()]


def card_memory() -> int:
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    except FileNotFoundError:
        return 0
    used = dict(line.split(", ") for line in lines if line.count(", ") == 1)
    return sum(int(used.get(str(rank.pid), "0")) for rank in ranks())


def processes_memory() -> int:
    return sum(process.memory_info().rss for process in psutil.Process().children()) >> 20


async def measure(llm: LLM, oracle: Oracle, options: argparse.Namespace) -> dict[str, Any]:
    began = time.monotonic()
    async with AsyncClient(address=llm.address) as client:
        traffic = Traffic(client, oracle, began + options.seconds)
        looks = asyncio.create_task(traffic.look(began))
        await asyncio.gather(*(traffic.user() for _ in range(options.users)))
        seen, stats = await looks, await client.stats()
    return {
        "seconds": round(time.monotonic() - began), "requests": dict(traffic.counts),
        "retractions": stats["num_retractions"], "cached_tokens": stats["cached_tokens_total"],
        "card_mb": [card for card, _ in seen], "processes_mb": [host for _, host in seen],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--users", type=int, default=96)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--near", type=float, default=1e-3)
    options = parser.parse_args()
    oracle = Oracle(options.device, options.near)
    settings: dict[str, Any] = {"dtype": "float32", "context_length": CONTEXT, "max_total_tokens": 8192}
    try:
        with LLM(str(MODEL), device=options.device, max_running_requests=64, **settings) as llm:
            result = asyncio.run(measure(llm, oracle, options))
    finally:
        oracle.jobs.put(None)
    oracle.thread.join()
    result["tokens"] = dict(oracle.counts)
    print(json.dumps(result))
    sys.exit(bool(oracle.counts["wrong"] or result["requests"].get("wrong document")))


if __name__ == "__main__":
    main()
