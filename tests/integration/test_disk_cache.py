"""The prefix cache on disk through whole engines: a restart is warm, and no file ever changes a token.

In float32, where no rounding makes a token depend on what is in the batch or in the cache. DISK_CACHE_KILLS for more
kills of a rank that is writing.
"""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from examples.tiny_model.prompts import closed_answer_prompts, with_shared_prefix
from tests.integration.daemon import Daemon, running, wait_until
from vibe_sgl_lite import Client, Output, SamplingParams

KILLS = int(os.environ.get("DISK_CACHE_KILLS", "3"))
FLAGS = ("--dtype", "float32", "--max-total-tokens", "20000")
QUESTIONS = with_shared_prefix(closed_answer_prompts(6, seed=9), stories=1, seed=9)
ANSWER = SamplingParams(max_new_tokens=20, temperature=0)
LIMIT_S = 60


def answers(client: Client) -> list[Output]:
    return client.chat([question.messages for question in QUESTIONS], ANSWER, enable_thinking=False)


def ids(outputs: list[Output]) -> list[list[int]]:
    return [list(output.token_ids) for output in outputs]


def cached(outputs: list[Output]) -> int:
    return sum(output.usage.cached_tokens for output in outputs if output.usage is not None)


def wait_stored(client: Client) -> None:
    """All that is in the tree has files."""

    def stored() -> bool:
        stats = client.stats()
        return int(stats["disk_pages"]) >= int(stats["kv_pages_cached"]) > 0

    wait_until(stored, LIMIT_S, "every page is stored")


def test_a_restart_is_warm(tmp_path: Path) -> None:
    folder = ("--cache-dir", str(tmp_path))
    with running(*FLAGS, *folder) as daemon, daemon.client() as client:
        cold = answers(client)
        warm = cached(answers(client))
        wait_stored(client)
        assert ids(answers(client)) == ids(cold)
    with running(*FLAGS, *folder) as daemon, daemon.client() as client:
        again = answers(client)
        assert ids(again) == ids(cold)
        # Not always as much as was cached: a request does not wait for what is computed as fast.
        assert min(cached(again), warm) > cached(cold)
        stats = client.stats()
        assert int(stats["disk_loaded_tokens_total"]) > 0
        assert stats["disk_failed_tokens_total"] == 0
        assert stats["cached_tokens_total"] == cached(again)


@pytest.mark.slow
def test_a_second_engine_is_refused_in_one_line(tmp_path: Path) -> None:
    flags = (*FLAGS, "--cache-dir", str(tmp_path))
    with running(*flags) as daemon, Daemon(*flags) as second:
        assert second.wait_exit(LIMIT_S) != 0
        assert f"in use by process {daemon.process.pid}" in second.log()
        assert len(second.log().splitlines()) == 1


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A folder with all answers' pages, and the right tokens."""
    folder = tmp_path_factory.mktemp("kept")
    with running(*FLAGS, "--cache-dir", str(folder)) as daemon, daemon.client() as client:
        tokens = ids(answers(client))
        wait_stored(client)
    return folder, tokens


def files(folder: Path) -> list[Path]:
    return sorted((folder / "pages").iterdir())


@pytest.mark.slow
def test_damaged_files_cost_a_computation_and_nothing_else(kept: tuple[Path, list[list[int]]]) -> None:
    """Every kind of byte, in every file in turn; what was read of them is stored anew."""
    folder, tokens = kept
    places = [0, 8, 16, 48, 52, 56, 60, 5000, -1]  # magic, length, key, rank, ranks, checksum, page
    for number, path in enumerate(files(folder)):
        whole = path.read_bytes()
        at = places[number % len(places)] % len(whole)
        damaged = whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :]
        path.write_bytes((damaged, whole[: len(whole) // 2], b"")[0 if number % 4 else number // 4 % 3])
    count = len(files(folder))
    with running(*FLAGS, "--cache-dir", str(folder)) as daemon, daemon.client() as client:
        assert int(client.stats()["disk_pages"]) > count // 2
        assert ids(answers(client)) == tokens
        assert int(client.stats()["disk_failed_tokens_total"]) > 0
        wait_stored(client)
    with running(*FLAGS, "--cache-dir", str(folder)) as daemon, daemon.client() as client:
        outputs = answers(client)
        assert ids(outputs) == tokens
        assert cached(outputs) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [
        ("--page-size", "8"), ("--kv-cache-dtype", "int8"), ("--dtype", "bfloat16"), ("--tp", "2"),
        ("--load-format", "dummy"), ("--load-format", "dummy", "--seed", "7"), ("--quantization", "int8"),
    ],
)  # fmt: skip
def test_other_settings_find_nothing(kept: tuple[Path, list[list[int]]], other: tuple[str, ...]) -> None:
    """And leave what is there; of the two seeds, each finds nothing of the other."""
    folder, _ = kept
    before = len(files(folder))
    with running(*FLAGS, "--cache-dir", str(folder), *other) as daemon, daemon.client() as client:
        answers(client)
        stats = client.stats()
        assert stats["disk_loaded_tokens_total"] == stats["disk_failed_tokens_total"] == 0
        wait_until(lambda: int(client.stats()["disk_stored_tokens_total"]) > 0, LIMIT_S, "it stores its own")
    assert len(files(folder)) > before


@pytest.mark.slow
def test_two_ranks_are_warm_too(tmp_path: Path) -> None:
    flags = (*FLAGS, "--tp", "2", "--cache-dir", str(tmp_path))
    with running(*flags) as daemon, daemon.client() as client:
        cold = answers(client)
        wait_stored(client)
    names = [path.name for path in files(tmp_path)]
    assert {name.split(".")[1] for name in names} == {"0-2", "1-2"}
    (tmp_path / "pages" / names[0]).unlink()  # of one rank: the page counts no more
    with running(*flags) as daemon, daemon.client() as client:
        again = answers(client)
        assert ids(again) == ids(cold)
        assert int(client.stats()["disk_loaded_tokens_total"]) > 0


@pytest.mark.slow
def test_a_folder_that_goes_away_while_it_runs(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with running(*FLAGS, "--cache-dir", str(folder)) as daemon, daemon.client() as client:
        right = ids(answers(client))
        wait_stored(client)
        folder.rename(tmp_path / "elsewhere")
        client.generate("Something new, so that there is something to store", ANSWER)
        wait_until(lambda: not client.stats()["disk_stores"], LIMIT_S, "it stores no more")
        assert ids(answers(client)) == right
        assert daemon.log().count("gets no more pages: No such file or directory") == 1


@pytest.mark.slow
def test_salts_share_nothing(tmp_path: Path) -> None:
    prompt, flags = "Once upon a time there was a little dog. " * 8, (*FLAGS, "--cache-dir", str(tmp_path))
    with running(*flags) as daemon, daemon.client() as client:
        client.generate(prompt, ANSWER, cache_salt="a")
        wait_stored(client)
    with running(*flags) as daemon, daemon.client() as client:
        for salt, hits in (("", False), ("b", False), ("a", True)):
            output = client.generate(prompt, ANSWER, cache_salt=salt)
            assert output.usage is not None
            assert (output.usage.cached_tokens > 0) == hits, salt


def wait_more(client: Client, counter: str, than: int) -> None:
    wait_until(lambda: int(client.stats()[counter]) > than, LIMIT_S, f"more than {than} of {counter}")


@pytest.mark.slow
def test_ranks_killed_while_they_write(tmp_path: Path) -> None:
    """Under traffic over a small pool and a small folder, at random moments: no token changes, the bound holds."""
    rng, limit = random.Random(1), 0.004
    stories = [[rng.randrange(300, 900) for _ in range(rng.randrange(20, 300))] for _ in range(30)]
    params = SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True)
    small = ("--dtype", "float32", "--max-total-tokens", "1600", "--max-restarts", str(10 * KILLS))
    with running("--dtype", "float32") as daemon, daemon.client() as client:
        right = ids(client.generate(input_ids=stories, sampling_params=params))
    wrong, enough = list[object](), threading.Event()

    def traffic(daemon: Daemon, seed: int) -> None:
        order = random.Random(seed)
        with daemon.client() as client:
            while not enough.is_set():
                number = order.randrange(len(stories))
                output = client.generate(input_ids=stories[number], sampling_params=params)
                if list(output.token_ids) != right[number]:
                    wrong.append((number, output))

    def used() -> int:
        sizes = []
        for path in tmp_path.glob("*/*"):
            try:
                sizes.append(0 if path.parent.name == "digests" else path.stat().st_size)
            except FileNotFoundError:
                continue
        return sum(sizes)

    flags = (*small, "--cache-dir", str(tmp_path), "--cache-dir-size", str(limit))
    with running(*flags, standby=True) as daemon, daemon.client() as client:
        threads = [threading.Thread(target=traffic, args=(daemon, seed)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for kill in range(KILLS):
            wait_more(client, "disk_stored_tokens_total", int(client.stats()["disk_stored_tokens_total"]))
            daemon.children()["model_worker.0"].kill()
            assert used() <= limit * 1e9
            wait_more(client, "rank_restarts_total", kill)
        enough.set()
        for thread in threads:
            thread.join(LIMIT_S)
        stats = client.stats()
        assert wrong == []
        assert int(stats["disk_loaded_tokens_total"]) > 0
        assert stats["disk_failed_tokens_total"] == 0
    assert used() <= limit * 1e9
