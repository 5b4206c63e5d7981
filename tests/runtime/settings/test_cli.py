"""The command line: flags, config files, and help that explains each flag."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.settings.cli import parse
from vibe_sgl_lite.runtime.settings.server_args import FLAGS, ServerArgs, flag_name


def test_no_flags_are_the_defaults() -> None:
    assert parse([]) == ServerArgs()


def test_flags_of_every_kind() -> None:
    args = parse(
        ["--model-path", "/m", "--page-size=4", "--step-timeout", "2.5", "--disable-radix-cache", "--seed", "7",
         "--disable-overlap", "false"]
    )  # fmt: skip
    assert args == ServerArgs(model_path="/m", page_size=4, step_timeout=2.5, disable_radix_cache=True, seed=7)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--page-size", "x"], "--page-size x must be a whole number"),
        (["--page-size", "1e3"], "--page-size 1e3 must be a whole number"),
        (["--page-size", ""], "--page-size  must be a whole number"),
        (["--page-size"], "--page-size: expected one argument"),
        (["--page", "1"], r"--page is not a flag; did you mean --page-size\?"),
        (["--pagesize=3"], r"--pagesize=3 is not a flag; did you mean --page-size\?"),
        (["/m"], "/m is not a flag; see --help"),
        (["serve", "/m", "/n"], "/m is not a flag; see --help"),
        (["serve", "/m", "--model-path", "/n"], "/m is not a flag; see --help"),
        (["--gpu-memory-utilization", "0.5"], "is not a flag; --mem-fraction-static is the nearest to it"),
        (["-m", "x"], "-m is not a flag; --model-path is the nearest to it"),
        (["-ngl", "99"], "-ngl is not a flag; --device is the nearest to it"),
        (["-tp", "2"], r"-tp is not a flag; did you mean --tp\?"),
        (["--dp-size=2"], "--dp-size=2 is not a flag; start one daemon for each replica"),
        (["--tp-sise", "2"], r"--tp-sise is not a flag; did you mean --tp-size\?"),
        (["--disable-overlap", "maybe"], "--disable-overlap maybe must be true or false"),
        (["--tp", "0"], "--tp 0 must be at least 1"),
        (["--config", "/nowhere/x.toml"], "--config /nowhere/x.toml: cannot be read"),
    ],
)
def test_bad_command_lines(argv: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(argv)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("c.toml", 'page-size = 8\nlog_level = "error"\ndisable-radix-cache = true\n'),
        ("c.yaml", "page-size: 8\nlog_level: error\ndisable-radix-cache: true\n"),
        ("c.yml", "page_size: 8\nlog-level: error\ndisable_radix_cache: true\n"),
    ],
)
def test_config_file_and_flags_win(tmp_path: Path, file: str, content: str) -> None:
    path = tmp_path / file
    path.write_text(content)
    assert parse(["--config", str(path)]) == ServerArgs(page_size=8, log_level="error", disable_radix_cache=True)
    args = parse(["--page-size", "2", "--config", str(path), "--disable-radix-cache=false"])
    assert args == ServerArgs(page_size=2, log_level="error")


def test_empty_yaml_file_sets_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# nothing yet\n")
    assert parse(["--config", str(tmp_path / "c.yaml")]) == ServerArgs()


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("c.toml", "pagesize = 8", "pagesize is not a setting; did you mean page_size"),
        ("c.toml", 'page_size = "8"', "--page-size 8 must be a whole number"),
        ("c.toml", "[page_size]\nx = 1", "--page-size .* must be a whole number"),
        ("c.toml", "page_size = ", "not valid TOML"),
        ("c.yaml", "page_size: [", "not valid YAML"),
        ("c.yaml", "- page_size", "must hold settings"),
        ("c.yaml", "1: 2", "must hold settings"),
        ("c.yaml", "config: x.yaml", "config is not a setting"),
        ("c.json", "{}", "must end in"),
    ],
)
def test_bad_config_files(tmp_path: Path, file: str, content: str, says: str) -> None:
    path = tmp_path / file
    path.write_text(content)
    with pytest.raises(ConfigError, match=says) as error:
        parse(["--config", str(path)])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_yaml_without_pyyaml_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.yaml").write_text("page_size: 8\n")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ConfigError, match="needs pyyaml"):
        parse(["--config", str(tmp_path / "c.yaml")])


def test_help_explains_every_flag_with_default_and_unit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in FLAGS.items():
        value = str(field.default).lower() if field.kinds == (bool,) else field.default
        default = field.spec.unset or f"{value} {field.spec.unit}"
        entry = f"{field.spec.help} (default: {default.strip()})".replace("`", "")
        assert f"{flag_name(name)} " in text
        assert entry.replace(" ", "") in text.replace(" ", ""), name  # argparse breaks lines at dashes


def test_serve_and_other_engines_names() -> None:
    assert parse(["serve"]) == ServerArgs()
    assert parse(["serve", "/m"]) == parse(["serve", "--model", "/m"]) == ServerArgs(model_path="/m")
    args = ["serve", "/m", "--tensor-parallel-size", "2", "--max-model-len=64", "--disable-overlap-schedule"]
    assert parse(args) == ServerArgs(model_path="/m", tp=2, context_length=64, disable_overlap=True)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("vibe-sgl-lite ")
