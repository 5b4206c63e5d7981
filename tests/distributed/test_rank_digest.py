"""--debug-rank-digest's comparison over real Gloo groups: every rank learns who differs, and in which step."""

from pathlib import Path

from tests.distributed.spawn import run_ranks


def test_a_difference_is_told_on_every_rank(tmp_path: Path) -> None:
    verdict = "ranks disagree in step 7: the batch of rank 2 is not that of rank 0"
    assert run_ranks("tests.distributed.cases:digest_verdicts", 3, tmp_path) == [["", verdict]] * 3
