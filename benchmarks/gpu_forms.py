r"""One request through the whole pipeline on a GPU, with a model's matrices in bf16 and as codes.

    python benchmarks/gpu_forms.py --model-path qwen3-8b --form plain,awq,int4,fp8

Random weights, 128 ids in and 256 out; an engine for each form, all of them started together and timed one after the
other, so that they share the card. Forms as in internal/gpu_step.py, of which the folder needs only config.json. Prints
a line for each: output tok/s of the whole request, the best of five, and times bf16's.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/gpu_forms.py` finds the benchmarks package

from benchmarks.gpu_offline import HIGHEST_ID, run  # noqa: E402
from benchmarks.internal.gpu_step import FORMS  # noqa: E402
from benchmarks.options import vocab_size_of  # noqa: E402
from vibe_sgl_lite import LLM  # noqa: E402

INPUTS, OUTPUTS, TIMES = 128, 256, 5


def start(options: argparse.Namespace, form: str, made: Path) -> LLM:
    folder = made / form
    folder.mkdir()
    config: dict[str, Any] = json.loads((Path(options.model_path) / "config.json").read_text())
    if form in FORMS:
        config["quantization_config"] = FORMS[form]
    (folder / "config.json").write_text(json.dumps(config))
    return LLM(
        model_path=str(folder), tokenizer_path=options.tokenizer_path or options.model_path, load_format="dummy",
        dtype="bfloat16", device=options.device, context_length=1024, max_total_tokens=4096, max_running_requests=4,
        disable_radix_cache=True, quantization="int4" if form == "int4" else "none",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--tokenizer-path", help="(the model's folder)")
    parser.add_argument("--form", default="plain,awq,int4")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    forms, choose = options.form.split(","), random.Random(0)
    most = min(HIGHEST_ID, vocab_size_of(options.model_path) - 1)
    prompts = [[choose.randint(0, most) for _ in range(INPUTS)] for _ in range(TIMES)]
    began = time.perf_counter()
    with ExitStack() as stack:
        made = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with ThreadPoolExecutor(len(forms)) as pool:
            engines = [stack.enter_context(llm) for llm in pool.map(lambda form: start(options, form, made), forms)]
        print(f"{len(forms)} engines in {time.perf_counter() - began:.1f} s", flush=True)
        plain = float("nan")
        for form, llm in zip(forms, engines, strict=True):
            run(llm, [prompts[0]], [8])
            rate = OUTPUTS / min(run(llm, [prompt], [OUTPUTS]) for prompt in prompts)
            plain = rate if form == "plain" else plain
            print(f"{form:>6}: {rate:7.1f} tok/s, {rate / plain:.2f} of bf16", flush=True)


if __name__ == "__main__":
    main()
