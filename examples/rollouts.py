"""A loop of reinforcement learning, as small as it gets: generate, "train", put new weights into the running engine.

python examples/rollouts.py [--steps N]

In place of a trainer, noise: of some perturbed checkpoints of the embedded model, the one is kept whose answers have
the most of a letter. So it is an evolution strategy with a population of two, and learns as badly as that sounds.
"""

import argparse
import json
import random
import shutil
import struct
import tempfile
from pathlib import Path

import vibe_sgl_lite
from vibe_sgl_lite import LLM, Output, SamplingParams

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=3, help="updates of the weights (3)")
args = parser.parse_args()

PROMPTS = ["Once upon a time", "There was a bear", "A little fox", "One day"]
PARAMS = SamplingParams(max_new_tokens=24, temperature=1.0, logprobs=True, seed=1)


def reward(outputs: list[Output]) -> float:
    return sum(out.text.count("a") for out in outputs) / sum(len(out.token_ids) for out in outputs)


def perturb(old: Path, new: Path, seed: int) -> None:
    """A checkpoint with other final norms: a safetensors file is a header, which says where a tensor's bytes are."""
    shutil.copytree(old, new)
    file = new / "model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + length])["model.norm.weight"]
    start, stop = (8 + length + offset for offset in entry["data_offsets"])
    draw = random.Random(seed)
    for at in range(start, stop, 2):  # bfloat16: the upper half of a float32
        (value,) = struct.unpack("<f", b"\0\0" + data[at : at + 2])
        data[at : at + 2] = struct.pack("<f", value * draw.uniform(0.7, 1.3))[2:]
    file.write_bytes(data)


with tempfile.TemporaryDirectory() as folder, LLM(weight_version="0", log_level="warning") as llm:
    best = Path(folder) / "0"
    shutil.copytree(Path(vibe_sgl_lite.__file__).parent / "models" / "tiny", best)
    outputs = llm.generate(PROMPTS, PARAMS)
    score = reward(outputs)
    for step in range(1, args.steps + 1):
        candidate = Path(folder) / str(step)
        perturb(best, candidate, seed=step)
        llm.update_weights_from_disk(candidate, weight_version=str(step))
        outputs = llm.generate(PROMPTS, PARAMS)
        # What a real trainer takes: token ids, the logprobs that they were drawn with, and by which weights.
        drawn = sum(entry.logprob for out in outputs for entry in out.logprobs or [])
        versions = {span.version for out in outputs for span in out.weight_versions}
        print(f"weights {', '.join(versions)}: reward {reward(outputs):.3f}, logprob of the samples {drawn:.1f}")
        if reward(outputs) > score:
            best, score = candidate, reward(outputs)
    llm.update_weights_from_disk(best, weight_version="best")
    print(f"weights {llm.weight_version()}: {llm.generate('Once upon a time', PARAMS).text!r}")
