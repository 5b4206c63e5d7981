"""From the user's settings to what the children need: the model found and read, every "auto" made concrete.

Nothing here imports torch: what only a rank can know (free memory, pages) comes back in its ready message.
"""

from __future__ import annotations

import importlib.util
import re
import secrets
from pathlib import Path

import msgspec

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.launcher.child import PipelineSpec
from vibe_sgl_lite.runtime.settings.checkpoint import settle
from vibe_sgl_lite.runtime.settings.machine import available_memory, has_gpu, usable_cores
from vibe_sgl_lite.runtime.settings.memory_parts import rank_memory
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig
from vibe_sgl_lite.runtime.settings.model_source import find_model
from vibe_sgl_lite.runtime.settings.parallel_degrees import check_parallel_degrees
from vibe_sgl_lite.runtime.settings.server_args import ServerArgs
from vibe_sgl_lite.runtime.settings.tokenizer_config import end_token_id
from vibe_sgl_lite.runtime.transport.endpoints import Endpoints

CHUNK_CPU = 512  # tokens
CHUNK_CUDA = 8192
PAGE_CPU = 16  # tokens
PAGE_CUDA = 64
DUMMY_DTYPE = "float32"  # of weights that are made up where config.json names no dtype, as in transformers
MOST_THREADS_A_CORE = 4  # beyond it is a mistake; some more than cores may be meant
NO_CUDA = "the torch that is installed was built without CUDA"
INT8_HEAD_DIM_MULTIPLE = 8  # what model_worker/kv_int8.py needs


def make_spec(args: ServerArgs, endpoints: Endpoints) -> PipelineSpec:
    """Find and read the model and resolve what is "auto". May download, with a progress bar on a terminal.

    Raises UserError (ConfigError, ModelConfigError) for what the user can fix; no process has been started by then.
    """
    source = find_model(args.model_path, weights=args.load_format != "dummy", revision=args.revision)
    tokenizer = source.folder
    if args.tokenizer_path is not None:
        tokenizer = find_model(args.tokenizer_path, weights=False, flag="--tokenizer-path").folder
    model = ModelConfig.from_folder(source.folder)
    check_parallel_degrees(model, args.tp, args.ep)
    if args.load_format != "dummy":
        model = settle(model, source.folder)
    end = end_token_id(tokenizer)
    if end is not None and end < model.vocab_size and end not in model.eos_token_ids:
        model = msgspec.structs.replace(model, eos_token_ids=(*model.eos_token_ids, end))
    device = _device(args.device)
    _check_kv_cache(args, model, device)
    if args.hicache_size and device == "cpu":
        raise ConfigError(
            f"--hicache-size {args.hicache_size:g} is for a GPU: on a CPU the KV cache is in the host's memory, and "
            "--max-total-tokens makes it larger",
            field="hicache_size",
        )
    dtype = (model.dtype or DUMMY_DTYPE) if args.dtype == "auto" else args.dtype
    if device == "cpu":
        _check_memory(args, model, dtype)
    return PipelineSpec(
        args=args,
        endpoints=endpoints,
        model=model,
        model_name=source.name,
        model_folder=str(source.folder),
        tokenizer_folder=str(tokenizer),
        context_length=_context_length(args, model),
        chunked_prefill_size=args.chunked_prefill_size or (CHUNK_CUDA if device == "cuda" else CHUNK_CPU),
        page_size=args.page_size or (PAGE_CUDA if device == "cuda" else PAGE_CPU),
        device=device,
        dtype=dtype,
        epoch=secrets.token_hex(8),
    )


def threads_per_rank(args: ServerArgs) -> int:
    """--num-threads, else a rank's share of the cores that this process may use, at least 1. Raises ConfigError."""
    cores = usable_cores()
    if args.num_threads is None:
        return max(1, int(cores.value) // len(args.local_ranks))
    if args.num_threads > MOST_THREADS_A_CORE * cores.value:
        raise ConfigError(
            f"--num-threads {args.num_threads} is far more than the {cores.value:g} cores here ({cores.source}), which "
            f"only makes steps slower: at most {MOST_THREADS_A_CORE} a core, or leave it out",
            field="num_threads",
        )
    return args.num_threads


def _context_length(args: ServerArgs, model: ModelConfig) -> int:
    if args.context_length is None:
        return model.context_limit
    if args.context_length > model.context_limit:
        raise ConfigError(
            f"--context-length {args.context_length} is above the model's max_position_embeddings="
            f"{model.context_limit}: ask for at most that",
            field="context_length",
        )
    return args.context_length


def _check_memory(args: ServerArgs, model: ModelConfig, dtype: str) -> None:
    """Refuse weights that this machine cannot hold: a rank would be killed while it loads them."""
    memory = rank_memory(model, tp=args.tp, ep=args.ep, dtype=dtype, quantization=args.quantization)
    ranks, limit = len(args.local_ranks), available_memory()
    if memory.weight_bytes * ranks > limit.value:
        raise ConfigError(
            f"--model-path {args.model_path}: its weights take {memory.weight_bytes * ranks / 2**30:.2f} GiB on this "
            f"machine, but {limit.value / 2**30:.2f} GiB are free ({limit.source}): try --quantization int4, or "
            "a smaller model",
            field="model_path",
        )


def _check_kv_cache(args: ServerArgs, model: ModelConfig, device: str) -> None:
    if args.kv_cache_dtype == "auto":
        return
    flag = f"--kv-cache-dtype {args.kv_cache_dtype}"
    if args.kv_cache_dtype == "fp8" and device != "cuda":
        raise ConfigError(
            f"{flag} runs on a GPU only, not on {device}: use --kv-cache-dtype int8 or auto", field="kv_cache_dtype"
        )
    if model.head_dim % INT8_HEAD_DIM_MULTIPLE:
        raise ConfigError(
            f"{flag} needs a head_dim that is a multiple of {INT8_HEAD_DIM_MULTIPLE}, and this model's is "
            f"{model.head_dim}: use --kv-cache-dtype auto",
            field="kv_cache_dtype",
        )


def _device(asked: str) -> str:
    if asked == "cpu":
        return asked
    problem = "no NVIDIA GPU is found here" if not has_gpu() else None if _torch_has_cuda() else NO_CUDA
    if asked == "cuda" and problem is not None:
        raise ConfigError(f"--device cuda: {problem}; give --device cpu, or leave it out", field="device")
    return "cuda" if problem is None else "cpu"


def _torch_has_cuda() -> bool:
    """Whether the installed torch was built for CUDA, read from its version file: importing it takes seconds."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return False
    version_file = Path(torch.origin).with_name("version.py")
    return version_file.is_file() and re.search(r"^cuda\b.*=\s*['\"]", version_file.read_text(), re.M) is not None
