"""docs/sampling.md names every keyword of the calls."""

from pathlib import Path

from vibe_sgl_lite.runtime.client.requests import CHAT_OPTIONS

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "sampling.md").read_text()


def test_every_keyword_is_told() -> None:
    for name in CHAT_OPTIONS:
        assert f"`{name}" in PAGE, name
