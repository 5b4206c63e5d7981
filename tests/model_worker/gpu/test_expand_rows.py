"""Steps of decode rows made on the device against the same steps made on the host."""

import random

import torch

from tests.model_worker.fake_device import Clock, FakeDevice
from vibe_sgl_lite.model_worker.batch import SlotStates
from vibe_sgl_lite.model_worker.gpu.kernels.expand_rows import expand_rows
from vibe_sgl_lite.model_worker.step_input import ExpandRows, StepInput
from vibe_sgl_lite.runtime.messages import ForwardBatch, NewSlot, pack_ids
from vibe_sgl_lite.runtime.settings.sampling_params import SamplingParams, resolve

SLOTS, CONTEXT, PAGE, PADDING_PAGE = 5, 40, 4, 99


class OnTheGpu(FakeDevice):
    """The GPU where there is one, since Triton has no other place for its tensors."""

    torch_device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    def tensor(self, array):  # type: ignore[no-untyped-def]
        return super().tensor(array).to(self.torch_device)


def states(expand: ExpandRows | None) -> SlotStates:
    device = OnTheGpu(Clock())
    return SlotStates(SLOTS, CONTEXT, PAGE, PADDING_PAGE, device, row_buckets=(2, 4, 8), expand_rows=expand)


def everything(step: StepInput) -> dict[str, list[object]]:
    if step.expand is not None:
        step.expand()
    batch = step.batch
    pages = [
        row[: -(-length // PAGE)].tolist() for row, length in zip(batch.page_table, batch.context_lengths, strict=True)
    ]
    return {
        "pages": pages,
        "host": [batch.host_query_start.tolist(), batch.host_context_lengths.tolist(), batch.max_context],
        "decode rows": [batch.num_decode_rows],
        "own": [step.slots.tolist(), step.sampling_rows.tolist(), step.sampling_slots.tolist()],
        "sampled": [step.sampling_positions.tolist(), step.last_tokens.tolist(), step.positions.tolist()],
        "places": [step.places.tolist(), step.device_slots.tolist()],
        "tokens": [batch.token_ids.tolist(), batch.positions.tolist(), batch.slot_mapping.tolist()],
        "rows": [batch.query_start.tolist(), batch.context_lengths.tolist()],
    }


def test_random_decode_steps(device: torch.device) -> None:
    rng = random.Random(0)
    sampling = resolve(
        SamplingParams(max_new_tokens=1, seed=0), model_defaults={}, end_token_ids=(), prompt_tokens=1,
        context_length=CONTEXT, vocab_size=256,
    )  # fmt: skip
    both = states(expand_rows), states(None)
    lengths = [rng.randint(1, 9) for _ in range(SLOTS)]
    new = []
    for slot, length in enumerate(lengths):
        ids = [rng.randrange(256) for _ in range(length)]
        pages = pack_ids(range(slot * 10, slot * 10 + 10))
        new.append(NewSlot(slot, slot, pack_ids(ids), length, length - 1, pages, sampling))
    rows: list[int] = []
    for number in range(30):
        if number % 4 in (0, 3):  # else the rows stay
            rows = rng.sample(range(SLOTS), rng.randint(1, SLOTS))
        batch = ForwardBatch(
            number, new=new if number == 0 else [], row_slots=pack_ids(rows), row_tokens=pack_ids([1] * len(rows)),
            page_slots=pack_ids([rows[0]]), page_index=pack_ids([1]), page_ids=pack_ids([50 + number]),
        )  # fmt: skip
        made = []
        for slots in both:
            slots.apply(batch)
            step = slots.prepare()
            made.append(everything(step))
            token_ids = torch.arange(len(rows), device=slots.tokens.device) + number
            slots.append(step, token_ids)
            if step.expand is not None and number % 3:  # as the draw does it
                step.batch.context_lengths.add_(step.batch.context_lengths > 0)
                slots.lengthened(step)
        assert made[0] == made[1]
