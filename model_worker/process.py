"""The rank process: `python -m vibe_sgl_lite.model_worker.process <spec file> <rank>`.

What computes comes with `worker`, whose imports take seconds (torch alone one): meanwhile memory for the weights is
committed. Imports nothing heavy itself.
"""

from __future__ import annotations

import sys

from vibe_sgl_lite.model_worker.early_memory import EarlyMemory
from vibe_sgl_lite.runtime.launcher.boot import loading
from vibe_sgl_lite.runtime.launcher.child import Child, PipelineSpec, run_child
from vibe_sgl_lite.runtime.launcher.spawn import RANK_PREFIX
from vibe_sgl_lite.runtime.settings.memory_parts import rank_memory


def prepare() -> None:
    """A spare process does this before it is needed."""
    import vibe_sgl_lite.model_worker.worker  # noqa: F401


def main(child: Child) -> None:
    memory = _memory_of_matrices(child.spec)
    with loading("vibe_sgl_lite.model_worker.worker"):
        from vibe_sgl_lite.model_worker import worker

    worker.main(child, int(sys.argv[2]), memory)


def _memory_of_matrices(spec: PipelineSpec) -> EarlyMemory | None:
    """What the CPU kernels keep this rank's in; None where there are no such kernels."""
    if spec.device != "cpu" or spec.dtype == "float16":
        return None
    args = spec.args
    memory = rank_memory(spec.model, tp=args.tp, ep=args.ep, dtype=spec.dtype, quantization=args.quantization)
    elsewhere = 0 if args.quantization == "int4" else memory.weights["embedding"]
    return EarlyMemory(memory.weight_bytes - elsewhere)


if __name__ == "__main__":
    run_child(f"{RANK_PREFIX}{sys.argv[2]}", main)
