"""docs/sampling.md names every sampling parameter with its default, and every keyword of the calls."""

from pathlib import Path

from vibe_sgl_lite.runtime.client.requests import ChatOptions
from vibe_sgl_lite.runtime.settings.sampling_params import DEFAULTS

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "sampling.md").read_text()


def test_every_parameter_is_in_the_table_with_its_default() -> None:
    rows = [[cell.strip().strip("`") for cell in line.split("|")[1:3]] for line in PAGE.splitlines() if "|" in line]
    defaults = {name: default for name, default in rows if name in DEFAULTS}
    assert defaults == {name: str(value) for name, value in DEFAULTS.items()}


def test_every_keyword_is_told() -> None:
    for name in ChatOptions.__annotations__.keys() - {"priority", "cache_salt"}:
        assert f"`{name}" in PAGE, name
