"""`vibe-sgl-lite plan`: the memory that a rank needs, by part, before anything is loaded. Takes the daemon's flags."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from vibe_sgl_lite.runtime.errors import ConfigError, UserError
from vibe_sgl_lite.runtime.logs import one_line
from vibe_sgl_lite.runtime.settings.checkpoint import settle
from vibe_sgl_lite.runtime.settings.cli import parse
from vibe_sgl_lite.runtime.settings.machine import available_memory, has_gpu, usable_cores
from vibe_sgl_lite.runtime.settings.memory_parts import rank_memory
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig
from vibe_sgl_lite.runtime.settings.model_source import find_model
from vibe_sgl_lite.runtime.settings.parallel_degrees import check_parallel_degrees
from vibe_sgl_lite.runtime.settings.server_args import ServerArgs

DUMMY_DTYPE = "float32"
GIB = 2**30


def main(argv: Sequence[str]) -> int:
    """Prints the plan, or what a start would refuse."""
    try:
        lines = list(_lines(parse(argv)))
    except UserError as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return 2
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _lines(args: ServerArgs) -> Iterator[str]:
    source = find_model(args.model_path, weights=False, revision=args.revision)
    model = ModelConfig.from_folder(source.folder)
    check_parallel_degrees(model, args.tp, args.ep)
    if args.load_format != "dummy" and any(source.folder.glob("*.safetensors")):
        model = settle(model, source.folder)
    dtype = (model.dtype or DUMMY_DTYPE) if args.dtype == "auto" else args.dtype
    context = model.context_limit if args.context_length is None else args.context_length
    if context > model.context_limit:
        raise ConfigError(
            f"--context-length {context} is above the model's {model.context_limit}", field="context_length"
        )
    gpu = args.device == "cuda" or (args.device == "auto" and has_gpu())
    memory = rank_memory(
        model, tp=args.tp, ep=args.ep, dtype=dtype, quantization=args.quantization,
        int8_cache=args.kv_cache_dtype != "auto", gpu=gpu,
    )  # fmt: skip
    kept = args.quantization
    if kept == "none" and gpu and model.quantized is not None:
        kept = f"{model.quantized.method} of {model.quantized.bits} bits"
    kept = dtype if kept == "none" else f"{kept}, else {dtype}"
    yield f"{source.name}: {args.tp} ranks (ep {args.ep}), matrices in {kept}; GiB of one rank"
    for part, size in memory.weights.items():
        if size:
            yield f"  {part:<20}{size / GIB:9.3f}"
    yield f"  {'weights':<20}{memory.weight_bytes / GIB:9.3f}"
    tokens = args.max_total_tokens or context
    words = "--max-total-tokens" if args.max_total_tokens else "one whole context"
    cache = tokens * memory.kv_token
    yield f"  {'KV cache':<20}{cache / GIB:9.3f}  of {tokens} tokens ({words}), {memory.kv_token} bytes each"
    yield f"  {'in all':<20}{(memory.weight_bytes + cache) / GIB:9.3f}"
    limit, cores = available_memory(), usable_cores()
    yield f"here: {limit.value / GIB:.2f} GiB free ({limit.source}), {cores.value:g} cores ({cores.source})"
