"""Draws a step's tokens in two launches, where no row asks for more than a temperature, a seed and a few candidates."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.device import Device, Fields
from vibe_sgl_lite.model_worker.gpu.kernels.sample import KEPT, num_chunks, sample
from vibe_sgl_lite.model_worker.gpu.operations import has_dependent_launch
from vibe_sgl_lite.model_worker.sampling.slots import Filters
from vibe_sgl_lite.qwen3.layers.parallel_state import Group, spread
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling


class GpuDraw:
    """A `FusedDraw` (sampling/sampler.py). Keeps each slot's parameters on the device, so that a graph finds them."""

    def __init__(self, device: Device, max_slots: int, max_rows: int, vocab_size: int, group: Group) -> None:
        """max_slots: with the padding slot, which draws greedily. max_rows: of a step, padding rows included. group:
        the ranks that share the vocabulary."""
        self._group = group
        self._first = spread(vocab_size, group).start
        self._pdl = has_dependent_launch(device.torch_device)
        self._slots = Fields(
            device, max_slots, inverse_temperatures=np.float64, seeds=np.int64, top_ks=np.int32, top_ps=np.float64,
            max_distances=np.float64,
        )  # fmt: skip
        self._taken: npt.NDArray[np.bool_] = np.ones(max_slots, dtype=np.bool_)
        self._scratch = torch.empty(
            max_rows * num_chunks(-(-vocab_size // group.size)), dtype=torch.float32, device=device.torch_device
        )
        # In a place of its own: while a graph draws, the logits lie where other graphs keep what they make.
        self._token_ids = torch.empty(max_rows, dtype=torch.int32, device=device.torch_device)
        self._changed = False

    def admit(self, slot: int, sampling: ResolvedSampling, filters: Filters | None, *, plain: bool) -> None:
        host = self._slots.host
        host["inverse_temperatures"][slot] = 0.0 if sampling.greedy else 1.0 / sampling.temperature
        host["seeds"][slot] = sampling.seed - (1 << 64) if sampling.seed >= 1 << 63 else sampling.seed
        few = filters is not None and filters.top_k <= KEPT
        host["top_ks"][slot] = filters.top_k if filters is not None and few else 0
        host["top_ps"][slot] = 1.0 if filters is None else filters.top_p
        host["max_distances"][slot] = np.inf if filters is None else filters.max_distance
        self._taken[slot] = plain and (filters is None or few)
        self._changed = True

    def takes(self, slots: npt.NDArray[np.int32]) -> bool:
        if self._changed:
            self._slots.send(len(self._taken))
            self._changed = False
        return bool(self._taken[slots].all())

    def __call__(
        self,
        logits: Tensor,
        slots: Tensor,
        positions: Tensor,
        tokens: Tensor,
        places: Tensor,
        lengths: Tensor | None = None,
    ) -> Tensor:
        token_ids = self._token_ids[: len(logits)]
        of_slots = self._slots.device
        sample(
            logits, slots, positions, of_slots["inverse_temperatures"], of_slots["seeds"],
            (of_slots["top_ks"], of_slots["top_ps"], of_slots["max_distances"]), self._scratch, token_ids, tokens,
            places, lengths, pdl=self._pdl, group=self._group, first=self._first,
        )  # fmt: skip
        return token_ids
