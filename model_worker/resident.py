"""One rank's weights, KV pool and runner, and what becomes of them while no step runs: new weights, sleep, wake."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

import msgspec
import torch

from vibe_sgl_lite.model_worker.model_runner import ModelRunner
from vibe_sgl_lite.model_worker.weights import Progress, load_dummy_weights, load_weights
from vibe_sgl_lite.qwen3.layers.parallel_state import Group
from vibe_sgl_lite.qwen3.model import Qwen3
from vibe_sgl_lite.runtime.errors import RequestError, WeightsError
from vibe_sgl_lite.runtime.launcher.child import PipelineSpec
from vibe_sgl_lite.runtime.logs import one_line
from vibe_sgl_lite.runtime.messages import ErrorInfo, LoadWeights, Weights

Build = Callable[[PipelineSpec, Qwen3 | None], ModelRunner]

log = logging.getLogger(__name__)


def fill(model: Qwen3, weights: Weights, seed: int, progress: Progress, *, finite: bool = False) -> None:
    """Load `weights`; in place, where the model has others. Raises WeightsError; see `load_weights` for `finite`."""
    if weights.folder:
        load_weights(model, weights.folder, progress, finite=finite)
    else:
        load_dummy_weights(model, seed, progress)


class Resident:
    """runner: None while it sleeps. Every call is for all ranks together.

    build: makes a runner, warm, around a model that is there or else one with the spec's weights. world: all ranks.
    """

    def __init__(
        self, spec: PipelineSpec, build: Build, world: Group, device: torch.device, progress: Progress
    ) -> None:
        self.runner: ModelRunner | None = build(spec, None)
        self._spec, self._build, self._world, self._device, self._progress = spec, build, world, device, progress
        self._model: Qwen3 | None = self.runner.model
        self._pages = self.runner.pool.num_pages

    def load(self, message: LoadWeights) -> ErrorInfo | None:
        """Take other weights. When any rank cannot, all have those in force again, and it is told why.

        Raises WeightsError when these cannot be had again either.
        """
        assert self._model is not None, "weights for a model that is not there"
        problem, seed = "", self._spec.args.seed
        try:
            fill(self._model, message.weights, seed, self._progress, finite=True)
        except WeightsError as error:
            problem = str(error)
        failed = torch.tensor([int(bool(problem))], dtype=torch.int32, device=self._device)
        if not self._world.all_reduce_max(failed).item():
            return None
        problem = problem or f"{message.weights.folder}: another rank could not load its part; the log tells more"
        log.warning("weights %r are not taken: %s", message.weights.version, problem)
        fill(self._model, message.in_force, seed, self._progress)
        self._meet()
        return ErrorInfo(RequestError.code, one_line(problem), "path")

    def sleep(self, level: int) -> None:
        """Free the KV pool, and with level 2 the weights. On a GPU either frees both: graphs hold the weights too."""
        if self._model is not None:
            self._model.all_layers = None  # its programs know the pool
        self.runner = None
        if level > 1 or self._device.type == "cuda":
            self._model = None
        gc.unfreeze()  # what was there when this process became ready
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._meet()

    def wake(self, weights: Weights) -> ModelRunner:
        """As large a pool as before, and `weights` if there are none. Raises what a start raises."""
        args = msgspec.structs.replace(self._spec.args, max_total_tokens=self._pages * self._spec.page_size)
        spec = msgspec.structs.replace(self._spec, args=args, new_weights=weights)
        runner = self.runner = self._build(spec, self._model)
        self._model = runner.model
        gc.freeze()
        return runner

    def _meet(self) -> None:
        self._world.all_reduce_max(torch.zeros(1, dtype=torch.int32, device=self._device))
