"""Steps whose rows have drafts, on a device that works behind the host's back: it proposes them, checks them and keeps
the true lengths itself, so that the next step is launched before anybody knows what this one yielded.

The host knows the most that a row may be (the scheduler has pages for that), and makes up for the rest when the result
is here: `SlotStates.settle`.

Legend: R rows of a step, N its width: the tokens that every row has place for, its drafts and one more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vibe_sgl_lite.model_worker.device import Fields
from vibe_sgl_lite.model_worker.device_batch import DeviceBatch, IntArray
from vibe_sgl_lite.model_worker.step_input import StepBuffers, StepInput

WIDTHS = (2, 4, 8)  # and the most that a row may have
MOST_DRAFTS = 64  # of a step that is captured, as the scheduler has it: SchedulerConfig.draft_budget
MOST_TOKENS = 256  # of such a step with its padding

DraftBucket = tuple[int, int]  # rows and width


class DraftKernels(Protocol):
    """What model_worker/gpu/kernels/speculate.py does, or with a model model_worker/gpu/draft_model.py."""

    def bind(self, buffers: StepBuffers, max_rows: int) -> None:
        """Of the slots' state, and of steps."""
        ...

    def forget(self, slots: npt.NDArray[np.integer], lengths: IntArray) -> None:
        """These slots, of which the device knew the lengths, have so many tokens, or 0 anew."""
        ...

    def catch_up(self, slots: IntArray, lengths: IntArray, known: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Before a step of these slots, of such lengths where the device does not know them: which may have drafts."""
        ...

    def propose(
        self, slots: Tensor, known: Tensor, rooms: Tensor, lengths: Tensor, tokens: Tensor, row_lengths: Tensor,
        drafted: Tensor, most: int,
    ) -> None: ...  # fmt: skip

    def expand(
        self, slots: Tensor, row_lengths: Tensor, drafted: Tensor, tokens: Tensor, slot_pages: Tensor,
        token_ids: Tensor, positions: Tensor, slot_mapping: Tensor, row_pages: Tensor, context_lengths: Tensor,
        sampled_positions: Tensor, places: Tensor, token_slots: Tensor, page_size: int, padding_page: int,
    ) -> None: ...  # fmt: skip

    def accept(
        self, sampled: Tensor, token_ids: Tensor, slots: Tensor, row_lengths: Tensor, drafted: Tensor, lengths: Tensor,
        result: Tensor,
    ) -> None: ...  # fmt: skip


def widths(most: int) -> tuple[int, ...]:
    """Of steps of up to `most` drafts a row."""
    return (*(width for width in WIDTHS if width < 1 + most), 1 + most)


def draft_buckets(row_buckets: Sequence[int], most: int) -> tuple[DraftBucket, ...]:
    """Steps to capture: of all numbers of rows that the budget of a step allows beside so many drafts."""
    buckets = []
    for narrower, width in zip((1, *widths(most)), widths(most), strict=False):
        fitting = [rows for rows in sorted(row_buckets) if rows * width <= MOST_TOKENS]
        full = next((rows for rows in fitting if rows * narrower >= MOST_DRAFTS), MOST_DRAFTS)
        buckets += [(rows, width) for rows in fitting if rows <= full]
    return tuple(buckets)


@dataclass(frozen=True)
class _Views:
    """The device's tensors of a step of so many rows and tokens: the same in every such step."""

    batch: dict[str, Tensor]
    step: dict[str, Tensor]
    expand: Callable[[], None]
    accept: Callable[[Tensor], Tensor]


class DraftSteps:
    """Of one rank, for one step at a time. The slots' state is that of `buffers`; the last slot is padding."""

    def __init__(self, kernels: DraftKernels, buffers: StepBuffers, most: int, buckets: Sequence[DraftBucket]) -> None:
        """most: drafts of a row."""
        self.most = most
        self.buckets = frozenset(buckets)
        self._sorted = sorted(buckets, key=lambda bucket: (bucket[1], bucket[0]))
        self._kernels, self._buffers = kernels, buffers
        slots = len(buffers.page_table)
        self._max_rows = max(slots, *(rows for rows, _ in buckets), 1)
        tokens = max(self._max_rows * (1 + most), 1)
        self._rows = Fields(buffers.device, self._max_rows, slots=np.int64, known=np.int32, rooms=np.int32)

        def zeros(count: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=buffers.device.torch_device)

        self._lengths = zeros(slots)
        self._knows: npt.NDArray[np.bool_] = np.zeros(slots, dtype=np.bool_)  # of which slots `_lengths` is right
        self.knows_some = False  # if of any
        self._row_lengths, self._drafted, self._context_lengths = (zeros(self._max_rows) for _ in range(3))
        self._token_ids, self._positions = zeros(tokens), zeros(tokens)
        long = torch.int64
        self._slot_mapping, self._sampled_positions, self._places, self._token_slots = (
            zeros(tokens, long) for _ in range(4)
        )
        self._result = zeros(tokens + 2 * self._max_rows)
        self._counting = torch.arange(tokens + 1, device=buffers.device.torch_device)
        self._views: dict[DraftBucket, _Views] = {}
        kernels.bind(buffers, self._max_rows)

    def forget(self, slots: npt.NDArray[np.integer], lengths: IntArray) -> None:
        """The host knows more of these slots' lengths than the device; 0: nothing is known of them any more."""
        changed = self._knows[slots] | (lengths == 0)
        if changed.any():
            self._kernels.forget(slots[changed], lengths[changed])
        self._knows[slots] = False
        self.knows_some = bool(self._knows.any())

    def bucket(self, rows: int, most: int) -> DraftBucket:
        """The size of a step of so many rows of at most so many drafts."""
        found = next((bucket for bucket in self._sorted if bucket[0] >= rows and bucket[1] > most), None)
        return found or (rows, next(width for width in widths(self.most) if width > most))

    def fill(self, slots: IntArray, lengths: IntArray, rooms: IntArray, bucket: DraftBucket, longest: int) -> StepInput:
        """The step of each slot's last known token and as many drafts as it has room for, [R] each; then padding rows.

        lengths: known tokens; not read where the device knows. longest: the longest context that there may be.
        """
        rows, (padded, width) = len(slots), bucket
        self._buffers.send_pages()
        drafting = rooms * self._kernels.catch_up(slots, lengths, self._knows[slots])
        host = self._rows.host
        wanted = {
            "slots": _padded(slots, padded, self._buffers.padding_slot),
            "known": _padded(np.where(self._knows[slots], -1, lengths), padded, 0),
            "rooms": _padded(drafting, padded, 0),
        }
        if not all(np.array_equal(host[name][:padded], values) for name, values in wanted.items()):
            for name, values in wanted.items():
                host[name][:padded] = values
            self._rows.send(padded)
        self._knows[slots] = self.knows_some = True
        if bucket not in self._views:
            self._views[bucket] = self._make_views(padded, width)
        views = self._views[bucket]
        places = np.minimum(np.arange(width), rooms[:, None]).reshape(-1)  # behind a row's drafts are nobody's
        return StepInput(
            batch=DeviceBatch(
                **views.batch,
                num_decode_rows=padded,
                host_query_start=np.arange(padded + 1, dtype=np.int32) * width,
                host_context_lengths=_padded(lengths + rooms, padded, 0),
                max_context=longest,
                fills_bucket=False,
                width=width,
            ),
            slots=slots,
            sampling_rows=np.repeat(np.arange(rows), width),
            sampling_slots=np.repeat(slots.astype(np.int64), width),
            sampling_positions=np.repeat(lengths.astype(np.int64), width) + places,
            last_tokens=views.step["last_tokens"],
            positions=views.step["positions"],
            places=views.step["places"],
            device_slots=views.step["device_slots"],
            rooms=rooms,
            expand=views.expand,
            accept=views.accept,
        )

    def _make_views(self, padded: int, width: int) -> _Views:
        tokens = padded * width
        lengths, slots = self._context_lengths[:padded], self._rows.device["slots"][:padded]
        batch = {
            "token_ids": self._token_ids[:tokens],
            "positions": self._positions[:tokens],
            "slot_mapping": self._slot_mapping[:tokens],
            "query_start": (self._counting[: padded + 1] * width).to(torch.int32),
            "context_lengths": lengths,
            "page_table": self._buffers.row_pages[:padded],
        }
        step = {
            "last_tokens": self._counting[:tokens],
            "positions": self._sampled_positions[:tokens],
            "places": self._places[:tokens],
            "device_slots": self._token_slots[:tokens],
        }
        kernels, buffers, result = self._kernels, self._buffers, self._result[: tokens + 2 * padded]
        known, rooms = (self._rows.device[name][:padded] for name in ("known", "rooms"))
        own = self._row_lengths[:padded], self._drafted[:padded]
        made = (batch["token_ids"], batch["positions"], batch["slot_mapping"], batch["page_table"], lengths)

        def expand() -> None:
            kernels.propose(slots, known, rooms, self._lengths, buffers.tokens, *own, width - 1)
            sampled = step["positions"], step["places"], step["device_slots"]
            kernels.expand(
                slots, *own, buffers.tokens, buffers.device_pages, *made, *sampled, buffers.page_size,
                buffers.padding_page,
            )  # fmt: skip

        def accept(sampled: Tensor) -> Tensor:
            kernels.accept(sampled, batch["token_ids"], slots, *own, self._lengths, result)
            return result

        return _Views(batch, step, expand, accept)


def _padded(values: npt.NDArray[np.integer], count: int, rest: int) -> IntArray:
    padded = np.full(count, rest, dtype=np.int32)
    padded[: len(values)] = values
    return padded
