r"""What one GPU delivers through the whole pipeline, beside what its memory and its matrix units would allow.

    python benchmarks/gpu_offline.py --model-path qwen3-0.6b --load-format dummy
    python benchmarks/gpu_offline.py --model-path qwen3-0.6b --load-format dummy --disable-cuda-graph

Workload: 256 requests of 100 to 1,024 random ids in and as many out (seed 0, ignore_eos, temperature 0.6), sent at
once; then one request of 128 in and 256 out; both again with Qwen3's own top-k and top-p; and prompts alone, 28 of 640
tokens and one of 16,384. The floor is the workload's own: the weights read once a decode step, every token's keys and
values once a step that attends to them, the prompts' products, at the rates that the same run measures on the same
card. Prints a table and, last, one JSON line. Every other --flag VALUE goes to the engine.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/gpu_offline.py` finds the benchmarks package

from benchmarks.options import parse_with_engine_flags  # noqa: E402
from vibe_sgl_lite import LLM, SamplingParams  # noqa: E402

ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
HIGHEST_ID = 10_000  # of the prompts
PLAIN: dict[str, Any] = {"temperature": 0.6, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
FILTERED = PLAIN | {"top_p": 0.95, "top_k": 20}  # Qwen3's own
MEASURE = """
import json, torch
def timed(work, times):
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(3): work()
    begin.record()
    for _ in range(times): work()
    end.record(); torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / times
x = torch.empty(1 << 29, dtype=torch.int64, device="cuda").random_()
a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
print(json.dumps({"card": torch.cuda.get_device_name(0), "read_gb_s": x.nbytes / timed(x.max, 10) / 1e9,
                  "gemm_tflop_s": 2 * 8192**3 / timed(lambda: a @ b, 10) / 1e12}))
"""


def measure_card() -> dict[str, Any]:
    """Its name, what a reduction over 4 GiB reads a second, and an 8192^3 product in bf16; in a process of its own."""
    output = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True).stdout
    rates: dict[str, Any] = json.loads(output.splitlines()[-1])
    return rates


def floor_seconds(
    config: dict[str, Any], inputs: list[int], outputs: list[int], element: int, kv_element: int, card: dict[str, Any]
) -> dict[str, float]:
    """Seconds that the requests take at least, run all at once: by bytes to decode, by products to prefill."""
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    head_dim, kv_heads = config["head_dim"], config["num_key_value_heads"]
    heads = config["num_attention_heads"] * head_dim
    layer = hidden * (heads + 2 * kv_heads * head_dim) + heads * hidden + 3 * hidden * inner
    weights = layers * layer + config["vocab_size"] * hidden
    kv_bytes = 2 * layers * kv_heads * head_dim * kv_element
    steps = max(outputs) - 1  # the first token comes of the prefill
    attended = sum((2 * n + m) * (m - 1) // 2 for n, m in zip(inputs, outputs, strict=True))
    decode = (steps * weights * element + attended * kv_bytes) / (card["read_gb_s"] * 1e9)
    products = 2 * layers * layer * sum(inputs) + sum(2 * layers * heads * n * n for n in inputs)
    return {"decode": decode, "prefill": products / (card["gemm_tflop_s"] * 1e12)}


def run(llm: LLM, inputs: list[list[int]], outputs: list[int], **sampling: Any) -> float:
    """Seconds from sending the requests to the last of the answers."""
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True, seed=i, **sampling) for i, n in enumerate(outputs)]
    begin = time.perf_counter()
    answers = llm.generate(inputs, params)
    seconds = time.perf_counter() - begin
    assert [len(answer.token_ids) for answer in answers] == outputs
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2, help="of the workload; the best one counts (2)")
    options, settings = parse_with_engine_flags(parser)
    card = measure_card()
    config = json.loads((Path(options.model_path) / "config.json").read_text())
    choose = random.Random(0)
    prompts = [
        [choose.randint(0, HIGHEST_ID) for _ in range(choose.randint(100, 1024))] for _ in range(options.requests)
    ]
    outputs = [choose.randint(100, 1024) for _ in prompts]
    element = ELEMENT_BYTES[options.dtype]
    kv_element = 1 if settings.get("kv_cache_dtype", "auto") != "auto" else element
    floor = floor_seconds(config, [len(p) for p in prompts], outputs, element, kv_element, card)
    result = card | {
        "input_tokens": sum(map(len, prompts)), "output_tokens": sum(outputs), "decode_steps": max(outputs) - 1,
        "floor_tok_s": sum(outputs) / sum(floor.values()),
    }  # fmt: skip
    begin = time.perf_counter()
    with LLM(**settings, device="cuda", disable_radix_cache=True) as llm:
        result["startup_s"] = time.perf_counter() - begin
        run(llm, [[1] * 100] * 4, [8] * 4)
        result["seconds"] = min(run(llm, prompts, outputs, **PLAIN) for _ in range(options.rounds))
        one = [[choose.randint(0, HIGHEST_ID) for _ in range(128)]]
        single = min(run(llm, one, [256], **PLAIN) for _ in range(3))
        result["seconds_filtered"] = min(run(llm, prompts, outputs, **FILTERED) for _ in range(options.rounds))
        result["one_request_filtered_tok_s"] = 256 / min(run(llm, one, [256], **FILTERED) for _ in range(3))
        for count, length in ((28, 640), (1, 16_384)):
            alone = [[choose.randint(0, HIGHEST_ID) for _ in range(length)] for _ in range(count)]
            seconds = min(run(llm, alone, [1] * count, **PLAIN) for _ in range(3))
            result[f"prefill_{count}x{length}_tok_s"] = count * length / seconds
    result |= {
        "out_tok_s": sum(outputs) / result["seconds"],
        "out_filtered_tok_s": sum(outputs) / result["seconds_filtered"],
        "of_floor": sum(floor.values()) / result["seconds"],
        "one_request_tok_s": 256 / single,
        "one_request_floor_tok_s": 256 / sum(floor_seconds(config, [128], [256], element, kv_element, card).values()),
    }
    for name, value in result.items():
        print(f"{name:>24}  {value:,.3f}" if isinstance(value, float) else f"{name:>24}  {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
