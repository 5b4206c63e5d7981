"""Schedulers' cores and one rank in one process, without sockets and text: every decision of an engine, and
time to itself. For tests and measurements of what lies between the two."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

import vibe_sgl_lite.model_worker  # noqa: F401  before torch: settles how its threads wait

import torch  # isort: skip

from vibe_sgl_lite.model_worker.batch import Drafter
from vibe_sgl_lite.model_worker.compute import Compute, GpuSetup, choose_compute
from vibe_sgl_lite.model_worker.draft_model import DraftModel
from vibe_sgl_lite.model_worker.kv_pool import KVPool
from vibe_sgl_lite.model_worker.matrix_formats import choose_formats
from vibe_sgl_lite.model_worker.model_runner import ModelRunner
from vibe_sgl_lite.model_worker.pending_step import PendingStep
from vibe_sgl_lite.model_worker.runner_setup import draft_on_device
from vibe_sgl_lite.model_worker.weights import load_dummy_weights, load_weights
from vibe_sgl_lite.qwen3.layers.parallel_state import ParallelState
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.messages import AddRequest, Finish, ForwardBatch, TokenLogprob, pack_ids, unpack_ids
from vibe_sgl_lite.runtime.settings.checkpoint import settle
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling
from vibe_sgl_lite.scheduler.config import SchedulerConfig
from vibe_sgl_lite.scheduler.core import Scheduler


@dataclass
class Sample:
    """What came of one."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None


class Life:
    """One scheduler and its rank, which serve lists of requests to their end. seconds, cpu_seconds: of the last."""

    def __init__(self, config: SchedulerConfig, runner: ModelRunner, drafter: Drafter | None) -> None:
        self.core = Scheduler(config)
        self._config, self._runner, self._drafter = config, runner, drafter
        self.seconds = self.cpu_seconds = 0.0

    def plain_sibling(self) -> Life:
        """A scheduler without drafts at the same rank. Only one of them may serve at a time."""
        return Life(msgspec.structs.replace(self._config, draft_tokens=0), self._runner, None)

    def serve(
        self, prompts: Sequence[Sequence[int]], sampling: Sequence[ResolvedSampling], *, timed: bool = True
    ) -> list[Sample]:
        """Each prompt with its parameters, all there from the beginning.

        timed: else the scheduler learns nothing of what steps cost, and decides the same every time.
        """
        core, runner = self.core, self._runner
        runner.drafter = self._drafter
        samples = [Sample() for _ in prompts]
        began, cpu_began = time.perf_counter(), time.process_time()
        for uid, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
            assert core.add(AddRequest(uid, str(uid), pack_ids(prompt), params), began) is None
        pending: deque[PendingStep] = deque()
        while not core.idle:
            while (batch := core.schedule(time.perf_counter())) is not None:
                pending.append(runner.launch(batch))
            result = runner.collect(pending.popleft())
            if not timed:
                result = msgspec.structs.replace(result, total_s=0.0)
            outputs = core.complete(result, time.perf_counter())
            for uid, token in outputs.next_tokens:
                samples[uid].tokens += unpack_ids(token)
            for output in outputs.tokens:
                sample = samples[output.uid]
                sample.tokens += unpack_ids(output.token_ids)
                sample.logprobs += output.logprobs or ()
                sample.finish = output.finish
        self.seconds, self.cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        every_slot = pack_ids(range(self._config.max_running_requests))
        runner.run(ForwardBatch(0, released=every_slot, row_slots=b"", row_tokens=b""))
        return samples


class InProcess:
    """One rank, and schedulers to feed it."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        *,
        dummy: bool = False,
        quantization: str = "none",
        fixed_order: bool = False,
        pages: int = 512,
        page_size: int = 16,
        context: int = 2048,
        device: torch.device | None = None,
        drafts: int = 0,
        rows: int = 32,
        graph_rows: Sequence[int] = (),
        draft: Path | None = None,
    ) -> None:
        """pages: of the pool. context: tokens of a request at most. device: a GPU instead of a CPU; then also
        drafts: of a row at most, that it makes itself; rows: of a step; graph_rows: for which alone there are graphs,
        instead of many; draft: the folder of a model that makes them."""
        config, device = ModelConfig.from_folder(folder), device or torch.device("cpu")
        if not dummy:
            config = settle(config, folder)
        group = config.num_attention_heads // config.num_key_value_heads
        setup = (
            GpuSetup(group, config.vocab_size, rows, rows, 512, drafts=drafts, fixed_order=fixed_order)
            if device.type == "cuda"
            else None
        )
        self._compute = choose_compute(dtype, device, config.head_dim, setup, fixed_order=fixed_order)
        if graph_rows and self._compute.graphs is not None:
            self._compute.graphs.row_buckets, self._compute.graphs.chunk_buckets = graph_rows, ()
        self._rows, self._drafts = rows, drafts
        self.model = Qwen3(config, ParallelState(), dtype, device, self._compute.operations)
        choose_formats(self.model, quantization, self._compute.kernels, fixed_order=fixed_order)
        if dummy:
            load_dummy_weights(self.model, 0)
        else:
            load_weights(self.model, folder)
        self._pool = KVPool(config, 1, pages, page_size, dtype, device, layout=self._compute.kv_layout)
        if draft is not None and setup is not None:
            self._compute = self._with_draft(draft, pages, page_size, setup, dummy=dummy)
        self._runner: ModelRunner | None = None  # of a GPU, whose graphs are dear
        self._folder = folder
        self._context, self._tokenizer_file = context, folder / "tokenizer.json"
        self.core: Scheduler  # of the last list

    def begin(self, drafter: Drafter | None = None, *, drafts: int = 0, **settings: Any) -> Life:
        """settings: of `SchedulerConfig`. drafts: of a row at most, for a GPU to make."""
        config = SchedulerConfig(
            num_pages=self._pool.num_pages, page_size=self._pool.page_size,
            draft_tokens=drafts if drafter is None else drafter.most,
            **{"max_running_requests": self._rows} | settings,
        )  # fmt: skip
        return Life(config, self._make_runner(config, drafter), drafter)

    def serve(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[ResolvedSampling],
        drafter: Drafter | None = None,
        *,
        drafts: int = 0,
        timed: bool = True,
        **settings: Any,
    ) -> list[Sample]:
        """A life of one list of requests."""
        life = self.begin(drafter, drafts=drafts, **settings)
        self.core = life.core
        return life.serve(prompts, sampling, timed=timed)

    def draft_model(self, most: int, *, seed: int | None = None) -> DraftModel:
        """This model as its own; seed: with random weights of that seed, whose drafts hardly hold."""
        config, pool, dtype, device = self.model.config, self._pool, self.model.dtype, self.model.device
        model = Qwen3(config, ParallelState(), dtype, device, self._compute.operations)
        choose_formats(model, "none", self._compute.kernels)
        if seed is None:
            load_weights(model, self._folder)
        else:
            load_dummy_weights(model, seed)
        own = KVPool(config, 1, pool.num_pages, pool.page_size, dtype, device)
        return DraftModel(model, own, self._compute, most)

    def _with_draft(self, folder: Path, pages: int, page_size: int, setup: GpuSetup, *, dummy: bool) -> Compute:
        config = ModelConfig.from_folder(folder)
        if not dummy:
            config = settle(config, folder)
        dtype, device = self.model.dtype, self.model.device
        model = Qwen3(config, ParallelState(), dtype, device, self._compute.operations)
        choose_formats(model, "none", None)
        if dummy:
            load_dummy_weights(model, 1)
        else:
            load_weights(model, folder)
        pool = KVPool(config, 1, pages, page_size, dtype, device, layout=self._compute.kv_layout)
        return draft_on_device(self._compute, model, pool, replace(setup, graph_rows=0))

    def replace_drafts(self, **functions: Callable[..., None]) -> None:
        """Of a GPU's `DraftKernels`; before the first list."""
        kernels = self._compute.draft_kernels
        assert kernels is not None
        vars(kernels).update(functions)

    def _make_runner(self, config: SchedulerConfig, drafter: Drafter | None) -> ModelRunner:
        if self._runner is not None:
            return self._runner
        on_gpu = self._compute.device.torch_device.type == "cuda"
        file = self._tokenizer_file if self._tokenizer_file.exists() else None
        runner = ModelRunner(
            self.model, self._pool, self._compute, max_slots=self._rows if on_gpu else config.max_running_requests,
            context_length=self._context, tokenizer_file=file,
            drafter=drafter, device_drafts=self._drafts,
        )  # fmt: skip
        self._compute.plan_layers(self.model, runner.backend)
        runner.warm_up()
        if on_gpu:
            self._runner = runner
        return runner
