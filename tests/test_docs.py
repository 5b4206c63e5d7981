"""Documentation that must not fall behind: flags, the tree, links between pages."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import msgspec
import pytest

from vibe_sgl_lite.runtime.settings.server_args import FLAGS, ServerArgs, flag_name

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_every_flag_is_documented_with_its_default() -> None:
    rows: dict[str, tuple[str, str]] = {}
    for line in (ROOT / "docs" / "flags.md").read_text().splitlines():
        if line.startswith("| `--"):
            name, default, text = (cell.strip() for cell in line.strip("|").split("|", 2))
            rows[name.strip("`")] = (default, text)
    assert set(rows) == {"--config", *(flag_name(name) for name in FLAGS)}
    for field in msgspec.structs.fields(ServerArgs):
        flag = FLAGS[field.name]
        value = str(field.default).lower() if field.type is bool else field.default
        expected = flag.unset if field.default is None else f"`{value}` {flag.unit}".strip()
        default, text = rows[flag_name(field.name)]
        assert default == expected, field.name
        assert len(text) > 20, field.name
        for choice in flag.choices:
            assert f"`{choice}`" in text, f"{field.name}: {choice}"


def test_the_readme_tree_names_every_folder_and_nothing_else() -> None:
    tree = (ROOT / "README.md").read_text().split("## The tree", 1)[1].split("```")[1]
    named = {line.split()[0].rstrip("/") for line in tree.splitlines() if line and not line.startswith(" ")}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {line.split("/")[0] for line in tracked.splitlines() if "/" in line and not line.startswith(".")}
    assert named == folders | {"launch.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
