"""Runs a function on real ranks: one process each, Gloo between them, results back through files.

    results = run_ranks("tests.distributed.cases:logits", world_size=2, folder=tmp_path)

The function is called as function(rank, world_size, folder) after torch.distributed is up, and what it returns comes
back from every rank as a JSON value.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMEOUT_S = 120


def run_ranks(function: str, world_size: int, folder: Path, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """Start `world_size` ranks, wait, and return what each returned. Fails with the output of broken ranks."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.spawn", function, str(rank), str(world_size), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [rank.communicate(timeout=timeout_s)[0] for rank in ranks]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()
    failed = [number for number, rank in enumerate(ranks) if rank.returncode]
    assert not failed, "\n".join(f"rank {n} exited with {ranks[n].returncode}:\n{outputs[n]}" for n in failed)
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(world_size)]


def _main() -> None:
    import torch

    from vibe_sgl_lite.model_worker.parallel import init_parallel

    function, rank, world_size, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    init_parallel(rank, world_size, 1, torch.device("cpu"), folder / "rendezvous")
    module, name = function.split(":")
    result = getattr(importlib.import_module(module), name)(rank, world_size, folder)
    (folder / f"result-{rank}.json").write_text(json.dumps(result))
    if world_size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as ranks leave: a thread of an ended Gloo group aborts the interpreter's end, one time in some twenty


if __name__ == "__main__":
    _main()
