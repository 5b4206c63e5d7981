"""The same workload on transformers' `generate` (SDPA), in a process of its own: one JSON line on stdout.

Reads a JSON job on stdin: model_folder, load_format, dtype, device, num_threads, workload, seed.
All requests run as one left-padded batch, which is how transformers is used without a server; every row stops at its
own number of tokens, and only those count.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import msgspec
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from benchmarks.report import Timeline, summarize
from benchmarks.workloads import PREFILL_LEN, Workload, prefill_prompt


class Clock(StoppingCriteria):
    """Notes the time of every step and ends each row at its own length."""

    def __init__(self, prompt_len: int, output_lens: list[int]) -> None:
        self.prompt_len = prompt_len
        self.output_lens = torch.tensor(output_lens)
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        done: torch.Tensor = (input_ids.shape[1] - self.prompt_len) >= self.output_lens
        return done.to(input_ids.device)


def load(job: dict[str, Any]) -> Any:
    dtype = getattr(torch, job["dtype"])
    if job["load_format"] == "dummy":
        torch.manual_seed(job["seed"])
        torch.set_default_dtype(dtype)
        config = AutoConfig.from_pretrained(job["model_folder"])
        auto: Any = AutoModelForCausalLM  # its from_config is untyped
        model = auto.from_config(config)
        torch.set_default_dtype(torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(job["model_folder"], dtype=dtype)
    model.generation_config.eos_token_id = None
    return model.to(job["device"]).eval()


def run(model: Any, prompts: list[list[int]], output_lens: list[int]) -> list[Timeline]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    clock = Clock(longest, output_lens)
    start = time.perf_counter()
    model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=max(output_lens),
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    times = [at - start for at in clock.times]
    return [Timeline(submitted=0.0, tokens=times[:n]) for n in output_lens]


def main() -> None:
    job = json.load(sys.stdin)
    if job["num_threads"]:
        torch.set_num_threads(job["num_threads"])
    start = time.perf_counter()
    model = load(job)
    startup = time.perf_counter() - start
    workload = msgspec.convert(job["workload"], Workload)
    vocab = model.config.vocab_size
    with torch.inference_mode():
        run(model, [prefill_prompt(vocab, 99, 32)], [4])  # warm-up
        prefill = [run(model, [prefill_prompt(vocab, n)], [1])[0].tokens[0] for n in range(3)]
        timelines = run(model, workload.prompts, workload.output_lens)
    unit = 1024 * 1024 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    result = summarize(timelines, prefill, PREFILL_LEN)
    result |= {"startup_s": round(startup, 2), "peak_rss_mb": round(peak), "version": transformers.__version__}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
