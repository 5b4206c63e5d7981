r"""Whether a GPU's tokens are right: greedy ones against transformers, drawn ones against this engine on the CPU.

    python benchmarks/gpu_tokens.py                   the embedded model in fp32
    python benchmarks/gpu_tokens.py --requests 256

Every engine gets the same requests at once, of 1 to 300 tokens in and 1 to 48 out: half of them greedy, the others with
seeds, and a part of these with filters and penalties. A greedy request is right if each of its tokens is the argmax of
transformers' logits in fp32 after all before it. One engine a setting: pages of 16, 64 and 128 tokens, with graphs and
without; `--settings 0,2` are the first and the third of them. Prints a line for each; exits with 1 if a token differs.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/gpu_tokens.py` finds the package

from vibe_sgl_lite import LLM, SamplingParams  # noqa: E402

MODEL = ROOT / "vibe_sgl_lite" / "models" / "tiny"
VOCAB = 2000  # ids of prompts
SETTINGS: list[dict[str, Any]] = [
    {"page_size": 64},
    {"page_size": 64, "disable_cuda_graph": True},
    {"page_size": 16, "chunked_prefill_size": 256},
    {"page_size": 128, "cuda_graph_max_bs": 16},
]


def make_requests(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    choose = random.Random(0)
    prompts = [[choose.randrange(VOCAB) for _ in range(choose.randint(1, 300))] for _ in range(count)]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_k": -1, "top_p": 1.0},
        {"temperature": 0.0},
        {"temperature": 1.1, "top_k": 40, "top_p": 0.9},
        {"temperature": 0.0},
        {"temperature": 0.9, "repetition_penalty": 1.2, "top_k": -1, "top_p": 1.0},
    ]
    params = [
        SamplingParams(max_new_tokens=choose.randint(1, 48), ignore_eos=True, seed=i, **kinds[i % len(kinds)])
        for i in range(count)
    ]
    return prompts, params


def run(prompts: list[list[int]], params: list[SamplingParams], **settings: Any) -> list[list[int]]:
    with LLM(str(MODEL), dtype="float32", context_length=512, max_total_tokens=65_536, **settings) as llm:
        return [list(answer.token_ids) for answer in llm.generate(prompts, params)]


def wrong_greedy(prompts: list[list[int]], outputs: list[list[int]], greedy: list[int]) -> list[int]:
    """The greedy requests with a token that transformers would not give."""
    import torch
    import transformers

    torch.backends.cuda.matmul.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = model.to(device).eval()
    wrong = []
    for i in greedy:
        with torch.inference_mode():
            logits = model(torch.tensor([prompts[i] + outputs[i]], device=device)).logits[0]
        if logits[len(prompts[i]) - 1 : -1].argmax(-1).tolist() != outputs[i]:
            wrong.append(i)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--settings", default="0,1,2,3", help="which of them (all)")
    options = parser.parse_args()
    prompts, params = make_requests(options.requests)
    greedy = [i for i in range(options.requests) if i % 2 == 0]
    drawn = [i for i in range(options.requests) if i % 2]
    on_cpu = run(prompts, params, device="cpu")
    failed = False
    for settings in (SETTINGS[int(number)] for number in options.settings.split(",")):
        outputs = run(prompts, params, device="cuda", **settings)
        wrong = wrong_greedy(prompts, outputs, greedy)
        other = [i for i in drawn if outputs[i] != on_cpu[i]]
        failed |= bool(wrong or other)
        print(
            f"{settings}: {len(greedy) - len(wrong)} of {len(greedy)} greedy requests as transformers, "
            f"{len(drawn) - len(other)} of {len(drawn)} drawn ones as on the CPU",
            f"(differ: {wrong + other})" if wrong or other else "",
            flush=True,
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
