"""Documentation that must not fall behind: flags, the tree, links between pages."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from docs import charts
from docs.tables import fill
from vibe_sgl_lite.runtime.settings.sampling_params import FIELDS
from vibe_sgl_lite.runtime.settings.server_args import FLAGS, flag_name

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_of_fields_are_those_of_the_code(page: Path) -> None:
    assert page.read_text() == fill(page.read_text()), "run `python docs/tables.py`"


def test_every_field_is_in_a_table() -> None:
    flags, sampling = ((ROOT / "docs" / name).read_text() for name in ("flags.md", "sampling.md"))
    assert sorted(re.findall(r"^\| `(--.*?)`", flags, re.M)) == sorted(["--config", *map(flag_name, FLAGS)])
    for name, field in FLAGS.items():
        row = next(line for line in flags.splitlines() if line.startswith(f"| `{flag_name(name)}` "))
        for choice in field.spec.choices:
            assert f"`{choice}`" in row, f"{name}: {choice}"
    assert [line.split("`")[1] for line in sampling.splitlines() if line.startswith("| `")][: len(FIELDS)] == [*FIELDS]


def test_the_readme_tree_names_every_folder_and_nothing_else() -> None:
    tree = (ROOT / "README.md").read_text().split("## The tree", 1)[1].split("```")[1]
    named = {line.split()[0].rstrip("/") for line in tree.splitlines() if line and not line.startswith(" ")}
    folders = {path.split("/")[0] for path in TRACKED if "/" in path and not path.startswith(".")}
    assert named == folders | {"launch.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, heading in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
            if heading:
                assert heading in anchors(page.parent / target if target else page), f"{target}#{heading}"


def anchors(page: Path) -> set[str]:
    """What links call the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


# Notebooks name files as they were on their day, and one page is about others' projects.
OF_THE_PAST_OR_ELSEWHERE = ("CHANGELOG.md", "decisions.md", "measurements.md", "migration.md")
FILE = re.compile(r"(?<![\w/.~$<>{}*-])(?:[\w.-]+/)*[\w-]+\.(?:py|cpp|h|cu|sh|md|toml|ya?ml)\b")
FOLDER = re.compile(r"`((?:[\w.-]+/)+)`")
ENDINGS = {path[start:] for path in TRACKED for start in (0, *(found.end() for found in re.finditer("/", path)))}
OTHERS = {"llama.cpp", "convert_hf_to_gguf.py", "version.py", "kernel.cu", "FILE.yaml"}  # others' files, and no files


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in OF_THE_PAST_OR_ELSEWHERE], ids=lambda page: page.name
)
def test_pages_name_files_and_folders_that_are_there(page: Path) -> None:
    """By their paths, or the ends of these: `model_worker/device.py` and, beside it, `device_batch.py`."""
    text = page.read_text()
    named = {name for code in re.findall(r"`([^`\n]+)`", text) for name in FILE.findall(code)}
    assert named - ENDINGS - OTHERS == set()
    assert [folder for folder in FOLDER.findall(text) if folder != "dist/" and not (ROOT / folder).is_dir()] == []


def test_sources_name_files_that_are_there() -> None:
    """In comments and docstrings, and in what `--help` says."""
    suffixes = {".py", ".cpp", ".h", ".cu", ".sh", ".toml", ".yml", ".js", ".html", ".css", ""}
    lost = [
        f"{path}: {name}"
        for path in TRACKED
        if not path.startswith("tests/") and (ROOT / path).suffix in suffixes and (ROOT / path).is_file()
        for name in FILE.findall((ROOT / path).read_text())
        if name not in ENDINGS | OTHERS
    ]
    assert lost == []


def test_every_page_is_in_the_site_once() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    assert sorted(re.findall(r"\S+\.md", nav)) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_the_path_through_the_code_names_files_that_are_there() -> None:
    named = re.findall(r"`([\w/]+(?:\.py|/))`", (ROOT / "docs" / "reading.md").read_text())
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []
    table = re.findall(r"^\| \d \| `([\w/]+\.py)`", (ROOT / "docs" / "reading.md").read_text(), re.M)
    lines = [len((ROOT / name).read_text().splitlines()) for name in table]
    assert len(lines) == 8
    assert max(lines) <= 450
    assert sum(lines) == pytest.approx(2300, rel=0.1)


@pytest.mark.parametrize("path", charts.CHARTS, ids=lambda path: path.name)
def test_the_charts_show_the_tables(path: Path) -> None:
    assert path.read_text() == charts.CHARTS[path](), "run `python docs/charts.py`"


SCRIPT = re.compile(r"python3?(?: -\w)* (?:-m ([\w.]+)|((?:[\w.-]+/)*[\w-]+\.py)\b)")
COMMAND = re.compile(r"(?:launch\.py|vibe-sgl-lite)((?: (?!chat|top|bench|plan|keygen)[^\n`|&;]*)?)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_programs_and_flags_that_there_are(page: Path) -> None:
    text = page.read_text().replace("\\\n", " ")
    foreign = ("sglang.launch_server", "venv", "http.server", "pytest", "build")
    for module, file in SCRIPT.findall(text):
        path = ROOT / file if file else ROOT / (module.replace(".", "/") + ".py")
        assert module in foreign or path.exists() or path.with_suffix("").is_dir(), module or file
    flags = {flag_name(name) for field in FLAGS for name in (field, *FLAGS[field].spec.aliases)} | {
        "--config", "--version", "--help",
    }  # fmt: skip
    named = {flag for rest in COMMAND.findall(text) for flag in re.findall(r" (--[\w-]+)", rest)}
    assert named - flags == set()
