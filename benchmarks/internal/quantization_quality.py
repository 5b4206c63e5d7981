"""What fewer bits do to a model's answers: the KL divergence of next-token distributions from those of bf16.

    python benchmarks/internal/quantization_quality.py --model-path ../shared/models/qwen3-0.6b --load-format dummy
    python benchmarks/internal/quantization_quality.py --texts my_texts.txt
    python benchmarks/internal/quantization_quality.py --device cuda --reference fp32

Every prompt runs through the model in chunks of 64 tokens, once a variant, and all its tokens' logits are compared with
those of bf16. `fp32` shows what bf16's own rounding does. With `--device cuda` the variants are those of a GPU. A file
of texts has one a line; without one, prompts are random token ids. With dummy weights the distributions are those of no
language: nearly flat, so their KL says how large the errors of logits are, not what a user would notice. Prints a table
and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/internal/quantization_quality.py` finds the packages

import vibe_sgl_lite.model_worker  # noqa: E402, F401, I001  before torch: settles how its threads wait
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from vibe_sgl_lite.model_worker.compute import GpuSetup, choose_compute  # noqa: E402
from vibe_sgl_lite.model_worker.kv_pool import KVPool  # noqa: E402
from vibe_sgl_lite.model_worker.matrix_formats import choose_formats  # noqa: E402
from vibe_sgl_lite.model_worker.model_runner import ModelRunner  # noqa: E402
from vibe_sgl_lite.model_worker.weights import load_dummy_weights, load_weights  # noqa: E402
from vibe_sgl_lite.qwen3.model import Qwen3  # noqa: E402
from vibe_sgl_lite.qwen3.layers.parallel_state import ParallelState  # noqa: E402
from vibe_sgl_lite.runtime.messages import ForwardBatch, NewSlot, pack_ids  # noqa: E402
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig  # noqa: E402
from vibe_sgl_lite.runtime.settings.sampling_params import SamplingParams, resolve  # noqa: E402

PAGE, CHUNK = 16, 64
VARIANTS = {  # name -> dtype, --quantization, whether the KV cache is in 8 bits
    "bf16": (torch.bfloat16, "none", False),
    "fp32": (torch.float32, "none", False),
    "int8": (torch.bfloat16, "int8", False),
    "int4": (torch.bfloat16, "int4", False),
    "int8 KV": (torch.bfloat16, "none", True),
    "int8, int8 KV": (torch.bfloat16, "int8", True),
    "fp8 KV": (torch.bfloat16, "none", True),
}
OF_DEVICE = {
    "cpu": ("bf16", "fp32", "int8", "int4", "int8 KV", "int8, int8 KV"),
    "cuda": ("bf16", "fp32", "int8 KV", "fp8 KV"),
}


class Variant:
    """One way to keep the model, ready to run prompts."""

    def __init__(self, folder: Path, load_format: str, name: str, longest: int, device: torch.device) -> None:
        dtype, quantization, eight_bits = VARIANTS[name]
        config = ModelConfig.from_folder(folder)
        setup = GpuSetup(
            config.num_attention_heads // config.num_key_value_heads, config.vocab_size, 1, 0, fp8="fp8" in name
        )
        compute = choose_compute(dtype, device, config.head_dim, setup)
        model = Qwen3(config, ParallelState(), dtype, device, compute.operations)
        choose_formats(model, quantization, compute.kernels)
        if load_format == "dummy":
            load_dummy_weights(model, 0)
        else:
            load_weights(model, folder)
        self._pages = -(-longest // PAGE)
        layout = compute.kv_layout
        pool = KVPool(config, 1, self._pages, PAGE, dtype, device, int8=eight_bits, layout=layout)
        self._runner = ModelRunner(model, pool, compute, max_slots=1, context_length=longest + 1)

    def log_probabilities(self, ids: list[int]) -> Tensor:
        """[tokens, vocab] fp32: after each token of the prompt, those of the next."""
        runner, slot = self._runner, pack_ids([0])
        sampling = resolve(
            SamplingParams(temperature=0.0, seed=0, max_new_tokens=1),
            model_defaults={},
            end_token_ids=(),
            prompt_tokens=len(ids),
            context_length=len(ids) + 1,
            vocab_size=runner.model.config.vocab_size,
        )
        new = [NewSlot(0, 0, pack_ids(ids), len(ids), 0, pack_ids(range(self._pages)), sampling)]
        parts = []
        for start in range(0, len(ids), CHUNK):
            count = min(CHUNK, len(ids) - start)
            released = slot if start == 0 else b""
            batch = ForwardBatch(start, released=released, new=new, row_slots=slot, row_tokens=pack_ids([count]))
            runner.slots.apply(batch)
            step = runner.slots.prepare().batch
            metadata = runner.backend.prepare(step)
            hidden = runner.model.forward(step.token_ids, step.positions, runner.backend, metadata)
            parts.append(runner.model.logits(hidden).float().log_softmax(-1))
            new = []
        return torch.cat(parts)


class Transformers:
    """Its model in bf16, as a variant."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self._model, self._device = model.to(device).eval(), device

    def log_probabilities(self, ids: list[int]) -> Tensor:
        logits: Tensor = self._model(torch.tensor([ids], device=self._device)).logits[0]
        return logits.float().log_softmax(-1)


def read_prompts(options: argparse.Namespace, vocab_size: int) -> list[list[int]]:
    if options.texts is None:
        rng = np.random.default_rng(0)
        return [rng.integers(0, vocab_size, options.tokens).tolist() for _ in range(options.prompts)]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(options.model_path) / "tokenizer.json"))
    lines = Path(options.texts).read_text().splitlines()
    return [ids for line in lines if (ids := tokenizer.encode(line, add_special_tokens=False).ids)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default=str(ROOT / "vibe_sgl_lite" / "models" / "tiny"))
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--reference", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--texts", default=None, help="file of texts, one a line (random ids)")
    parser.add_argument("--prompts", type=int, default=4, help="random prompts (4)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each (256)")
    options = parser.parse_args()
    folder = Path(options.model_path)
    prompts = read_prompts(options, ModelConfig.from_folder(folder).vocab_size)
    longest = max(map(len, prompts))
    expected: list[Tensor] = []
    result: dict[str, dict[str, float]] = {}
    print(f"{sum(map(len, prompts))} tokens\n{'':>16}{'KL':>12}{'same best token':>18}")
    with torch.inference_mode():
        names = [options.reference, *(n for n in OF_DEVICE[options.device] if n != options.reference)]
        device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
        for name in names + ["transformers"] * (options.load_format == "auto"):
            variant: Variant | Transformers
            if name == "transformers":
                variant = Transformers(folder, device)
            else:
                variant = Variant(folder, options.load_format, name, longest, device)
            actual = [variant.log_probabilities(ids) for ids in prompts]
            if not expected:
                expected = actual
                continue
            p, q = torch.cat(expected), torch.cat(actual)
            divergence = float((p.exp() * (p - q)).sum(-1).mean())
            same = float((p.argmax(-1) == q.argmax(-1)).float().mean())
            result[name] = {"kl": divergence, "same_best_token": same}
            print(f"{name:>16}{divergence:>12.6f}{same:>17.1%}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
