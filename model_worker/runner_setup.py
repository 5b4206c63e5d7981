"""A rank's model with its weights, KV pool and runner, made from the spec; what a device lacks is refused by name."""

import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from vibe_sgl_lite.model_worker.batch import Drafter
from vibe_sgl_lite.model_worker.compute import Compute, GpuSetup, choose_compute
from vibe_sgl_lite.model_worker.cpu.shared_memory import share_memory
from vibe_sgl_lite.model_worker.draft_model import DraftModel
from vibe_sgl_lite.model_worker.early_memory import EarlyMemory
from vibe_sgl_lite.model_worker.kv_pool import KVPool
from vibe_sgl_lite.model_worker.matrix_formats import choose_formats
from vibe_sgl_lite.model_worker.memory_plan import plan_memory
from vibe_sgl_lite.model_worker.model_runner import ModelRunner
from vibe_sgl_lite.model_worker.ngram import NgramDrafter
from vibe_sgl_lite.model_worker.resident import fill
from vibe_sgl_lite.model_worker.weights import load_dummy_weights, load_weights
from vibe_sgl_lite.qwen3.checkpoint import weight_bytes
from vibe_sgl_lite.qwen3.layers.moe import DispatchKind
from vibe_sgl_lite.qwen3.layers.parallel_state import ParallelState
from vibe_sgl_lite.qwen3.layers.part_timer import NO_TIMER, PartTimer
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.launcher.child import PipelineSpec
from vibe_sgl_lite.runtime.settings.checkpoint import settle
from vibe_sgl_lite.runtime.settings.machine import usable_cores
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig
from vibe_sgl_lite.runtime.settings.parallel_degrees import check_parallel_degrees

DRAFT_PATH = "draft_model_path"
MOST_TILE = 64  # rows of queries that attention takes together
DISPATCH: Mapping[str, DispatchKind] = {"all-reduce": "all_reduce", "all-to-all": "all_to_all"}

log = logging.getLogger(__name__)


def build_runner(
    spec: PipelineSpec,
    parallel: ParallelState,
    device: torch.device,
    heartbeat: Callable[[], None],
    timer: PartTimer = NO_TIMER,
    model: Qwen3 | None = None,
    memory: EarlyMemory | None = None,
) -> ModelRunner:
    """Load this rank's weights and take its KV pool; all ranks together. `heartbeat` is called while it goes on.
    model: one with weights, which is then the runner's. memory: for the CPU kernels' matrices.

    Raises UserError for what is wrong with the model folder or with the settings.
    """
    args = spec.args
    dtype: torch.dtype = getattr(torch, spec.dtype)
    compute = choose_compute(
        dtype, device, spec.model.head_dim, _gpu_setup(spec, parallel), fixed_order=args.deterministic
    )
    _check(spec, compute)
    started = time.monotonic()
    if model is None:
        if compute.kernels is not None and args.dist_init_addr is None:
            parallel = share_memory(parallel, compute.kernels)
        model = Qwen3(spec.model, parallel, dtype, device, compute.operations, DISPATCH[args.moe_dispatch])
        early = None if memory is None else memory.take()
        choose_formats(model, args.quantization, compute.kernels, fixed_order=args.deterministic, memory=early)
        del early  # it goes now, where there are no kernels that keep it
        progress = LoadProgress(heartbeat, visible=parallel.rank == 0 and sys.stderr.isatty())
        fill(model, spec.weights, args.seed, progress)
    draft = None if args.draft_model_path is None else _load_draft(spec, model.parallel, device, compute, heartbeat)
    eight_bits = args.kv_cache_dtype != "auto"
    plan = plan_memory(
        spec.model,
        parallel.tp,
        page_size=spec.page_size,
        dtype=dtype,
        device=device,
        memory_fraction=args.mem_fraction_static,
        max_total_tokens=args.max_total_tokens,
        weight_bytes=weight_bytes(model) + (0 if draft is None else weight_bytes(draft)),
        ranks_on_machine=len(args.local_ranks),
        int8=eight_bits,
        draft=None if draft is None else draft.config,
    )
    pool = KVPool(
        spec.model, parallel.tp.size, plan.num_pages, spec.page_size, dtype, device, int8=eight_bits,
        layout=compute.kv_layout,
    )  # fmt: skip
    loaded = time.monotonic()
    pool.make_ready(len(args.local_ranks), heartbeat)
    drafter: Drafter | None = None
    if draft is not None:
        of_draft = KVPool(
            draft.config, parallel.tp.size, plan.num_pages, spec.page_size, dtype, device, int8=eight_bits,
            layout=compute.kv_layout,
        )  # fmt: skip
        of_draft.make_ready(len(args.local_ranks), heartbeat)
        if compute.draft_kernels is None:
            drafter = DraftModel(draft, of_draft, compute, args.draft_tokens)
        else:
            compute = draft_on_device(compute, draft, of_draft, replace(_gpu_setup(spec, parallel), graph_rows=0))
    elif args.draft_tokens and compute.draft_kernels is None:
        drafter = NgramDrafter(args.draft_tokens)
    log.info(
        "weights loaded in %.1f s: %s; %d threads (%s); %s",
        loaded - started,
        plan.words,
        torch.get_num_threads(),
        f"a share of {usable_cores().source}" if args.num_threads is None else "--num-threads",
        compute.name,
    )
    runner = ModelRunner(
        model,
        pool,
        compute,
        max_slots=args.max_running_requests,
        context_length=spec.context_length,
        max_tokens=spec.chunked_prefill_size + args.max_running_requests * (1 + args.draft_tokens),
        tokenizer_file=_tokenizer_file(spec),
        timer=timer,
        drafter=drafter,
        device_drafts=0 if compute.draft_kernels is None else _device_drafts(spec),
    )
    compute.plan_layers(model, runner.backend)
    return runner


def draft_on_device(compute: Compute, draft: Qwen3, pool: KVPool, setup: GpuSetup) -> Compute:
    """The same, with drafts by that model. setup: of the large model, without graphs."""
    from vibe_sgl_lite.model_worker.gpu.draft_model import DraftsByModel

    group = draft.config.num_attention_heads // draft.config.num_key_value_heads
    own = choose_compute(draft.dtype, draft.device, draft.config.head_dim, replace(setup, group=group))
    return replace(compute, draft_kernels=DraftsByModel(draft, pool, own, compute.device))


def _load_draft(
    spec: PipelineSpec, parallel: ParallelState, device: torch.device, compute: Compute, heartbeat: Callable[[], None]
) -> Qwen3:
    """The model of --draft-model-path, with its weights. Raises ConfigError for one that does not fit."""
    args = spec.args
    folder = Path(str(args.draft_model_path))
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--draft-model-path {folder} has no config.json: give a model's folder", field=DRAFT_PATH)
    config = ModelConfig.from_folder(folder)
    if args.load_format != "dummy":
        config = settle(config, folder)
    check_parallel_degrees(config, args.tp, args.ep)
    if config.vocab_size != spec.model.vocab_size:
        vocabularies = f"{config.vocab_size} entries, the model's {spec.model.vocab_size}"
        text = f"--draft-model-path {folder}: its vocabulary has {vocabularies}: take a Qwen3 with the same one"
        raise ConfigError(text, field=DRAFT_PATH)
    model = Qwen3(config, parallel, getattr(torch, spec.dtype), device, compute.operations, DISPATCH[args.moe_dispatch])
    choose_formats(model, args.quantization, compute.kernels, fixed_order=args.deterministic)
    progress = LoadProgress(heartbeat, visible=False)
    if args.load_format == "dummy":
        load_dummy_weights(model, args.seed, progress)
    else:
        load_weights(model, folder, progress)
    return model


def _check(spec: PipelineSpec, compute: Compute) -> None:
    """Raises ConfigError for what is asked of a device that does not have it."""
    args = spec.args
    if args.kv_cache_dtype == "fp8" and not compute.knows_fp8:
        raise ConfigError(
            f"--kv-cache-dtype fp8 needs Triton's kernels: this is {compute.name}", field="kv_cache_dtype"
        )
    if args.draft_model_path is not None and spec.device != "cpu" and (args.tp > 1 or args.deterministic):
        raise ConfigError(
            "--draft-model-path on a GPU is for one rank, without --deterministic: use --speculative-algorithm ngram",
            field=DRAFT_PATH,
        )
    if args.draft_tokens and spec.device != "cpu" and compute.draft_kernels is None:
        raise ConfigError(
            f"--speculative-algorithm {args.speculative_algorithm} on a GPU needs Triton: this is {compute.name}",
            field="speculative_algorithm",
        )
    has_kernels = compute.kernels is not None or compute.knows_fp8
    if args.deterministic and (not has_kernels or spec.model.is_moe):
        what = "a model with experts" if spec.model.is_moe else compute.name
        raise ConfigError(
            f"--deterministic is for dense models through compiled kernels: this is {what}", field="deterministic"
        )
    if args.deterministic and spec.device != "cpu" and (args.tp > 1 or args.quantization != "none"):
        raise ConfigError(
            "--deterministic on a GPU is for one rank and plain matrices: leave out --tp and --quantization, or it",
            field="deterministic",
        )


def _gpu_setup(spec: PipelineSpec, parallel: ParallelState) -> GpuSetup:
    args, tp = spec.args, parallel.tp.size
    graph_rows = args.cuda_graph_max_bs or args.max_running_requests
    return GpuSetup(
        group=spec.model.num_attention_heads // tp // spec.model.local_kv_heads(tp),
        vocab_size=spec.model.vocab_size,
        max_slots=args.max_running_requests,
        graph_rows=0 if args.disable_cuda_graph else graph_rows,
        chunk_tokens=spec.chunked_prefill_size,
        fp8=args.kv_cache_dtype == "fp8",
        tp=parallel.tp,
        drafts=_device_drafts(spec),
        fixed_order=args.deterministic,
    )


def _device_drafts(spec: PipelineSpec) -> int:
    """Drafts that a GPU makes for a row at most: attention has all of a KV head's query heads for them in one tile."""
    group = spec.model.num_attention_heads // spec.model.num_key_value_heads
    return min(spec.args.draft_tokens, max(1, MOST_TILE // group - 1))


def _tokenizer_file(spec: PipelineSpec) -> Path:
    """The tokenizer manager's file; on other nodes, which have none, the folder's, or one made of it here."""
    folder, file = Path(spec.tokenizer_folder), Path(spec.endpoints.tokenizer_file)
    if spec.args.node_rank == 0:
        return file
    if (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    from vibe_sgl_lite.runtime.text.chat_tokenizer import ChatTokenizer  # slow to import, rarely needed

    ChatTokenizer.from_folder(folder).write_json(file)
    return file


def too_little_left(fraction: float) -> str:
    """What to tell of a card on which weights and KV cache left no room for the largest step and the graphs."""
    return (
        f"--mem-fraction-static {fraction:g} leaves too little of the GPU's memory for the largest step and graphs: "
        "lower it, or lower --chunked-prefill-size or --max-running-requests"
    )


class LoadProgress:
    """Keeps the launcher informed while weights load, and a person at a terminal."""

    def __init__(self, heartbeat: Callable[[], None], *, visible: bool) -> None:
        self._heartbeat = heartbeat
        self._visible = visible
        self._shown = 0.0

    def __call__(self, done: int, total: int) -> None:
        self._heartbeat()
        now = time.monotonic()
        if self._visible and (done == total or now - self._shown > 0.2):
            self._shown = now
            end = "\n" if done == total else ""
            sys.stderr.write(f"\rloading weights: {done} of {total}{end}")
            sys.stderr.flush()
