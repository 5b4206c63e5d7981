"""In a control group of its own, as in a container: the KV pool fits the limit, and threads the quota."""

from __future__ import annotations

import json
import random
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.daemon import Daemon
from vibe_sgl_lite import SamplingParams
from vibe_sgl_lite.runtime.settings.model_source import embedded_folder

ROOT = Path("/sys/fs/cgroup")
# Of version 1 and of version 2: where a group is made, and what limits its memory.
PLACES = ((ROOT / "memory", "memory.limit_in_bytes"), (ROOT, "memory.max"))
# 128 KiB of KV cache a token, with almost no weights.
SHAPE = {
    "hidden_size": 64, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "intermediate_size": 64
}  # fmt: skip
LIMIT = 1 << 30


@pytest.fixture
def group() -> Iterator[Path]:
    """A group with LIMIT, where this machine lets tests make one."""
    for place, file in PLACES:
        group = place / f"test-{secrets.token_hex(4)}"
        try:
            group.mkdir()
            (group / file).write_text(str(LIMIT))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        yield group
        time.sleep(0.5)  # the kernel forgets the last process a moment later
        group.rmdir()
        return
    pytest.skip("no control group can be made here (tests/runtime/settings/test_machine.py has trees of files)")


def test_more_prompts_than_memory(group: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(embedded_folder(), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | SHAPE))
    under = ("sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh")
    with Daemon("--model-path", str(model), "--load-format", "dummy", "--log-level", "info", under=under) as daemon:
        pages = int(daemon.wait_ready()["kv_pages"])
        tokens = 16 * pages
        assert 1000 < tokens < (LIMIT >> 17)
        numbers = random.Random(0)
        with daemon.client() as client:
            served = 0
            while served < 1.3 * tokens:  # the pool is filled and used again
                prompts = [[numbers.randrange(300, 2000) for _ in range(500)] for _ in range(4)]
                outputs = client.generate(prompts, SamplingParams(max_new_tokens=1))
                assert all(output.finish_reason == "length" for output in outputs)
                served += 2000
        plan = next(line for line in daemon.log().splitlines() if "KV pages" in line and "model_worker.0" in line)
        for part in (f"limit {LIMIT >> 20} MiB", "weights 0.02 GiB", f"{pages} KV pages", "1 threads (--num-threads)"):
            assert part in plan
        assert daemon.stop() == 0


def test_more_tokens_than_memory_is_refused_in_one_line() -> None:
    with Daemon("--max-total-tokens", str(10**9)) as daemon:
        assert daemon.wait_exit() == 2
        assert daemon.rest_of_stdout() == ""
        errors = [line for line in daemon.log().splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert "--max-total-tokens 1000000000 needs" in errors[0]
        assert "ask for at most" in errors[0]
        assert "Traceback" not in daemon.log()
