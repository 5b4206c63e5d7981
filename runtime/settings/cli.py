"""The command line of `launch.py`: flags and `--config FILE` to one `ServerArgs`, and the text of `--help`."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.settings.schema import Field, hint
from vibe_sgl_lite.runtime.settings.server_args import FLAGS, ServerArgs, flag_name, make_args

DESCRIPTION = "Serve a Qwen3 model. Prints one line on stdout when ready; logs go to stderr; Ctrl-C stops it."
SERVE = "serve"  # the subcommand of people who come from other engines; ours needs none
CONFIG_HELP = "YAML or TOML file with the same settings, names with dashes or underscores; flags win over it"


def parse(argv: Sequence[str]) -> ServerArgs:
    """The settings of a command line: flags, and `serve MODEL` or just `MODEL` in front of them.

    Raises ConfigError; `--help` and `--version` print and raise SystemExit(0).
    """
    parser = _make_parser()
    flags, rest = parser.parse_known_args(list(argv))
    given: dict[str, Any] = vars(flags)
    config = given.pop("config", None)
    values: dict[str, Any] = {} if config is None else _read_config(Path(config))
    values.update({name: _from_text(name, text) for name, text in given.items()})
    if rest[:1] == [SERVE] == list(argv[:1]):
        rest = rest[1:]
        if len(rest) == 1 and not rest[0].startswith("-") and "model_path" not in given:
            values["model_path"] = rest.pop()
    if rest:
        name = rest[0].split("=")[0].lstrip("-").replace("-", "_")
        raise ConfigError(f"{rest[0]} is not a flag; {hint(name, FLAGS, flag_name) or 'see --help'}")
    return make_args(values)


class _Parser(argparse.ArgumentParser):
    """Errors are raised instead of printed with a usage text, so that the user sees one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def _make_parser() -> _Parser:
    parser = _Parser(prog="vibe-sgl-lite", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"%(prog)s {version()}")
    parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=CONFIG_HELP)
    for name, field in FLAGS.items():
        for flags, shown in (((flag_name(name),), True), (tuple(map(flag_name, field.spec.aliases)), False)):
            if flags:
                parser.add_argument(
                    *flags,
                    dest=name,
                    default=argparse.SUPPRESS,
                    metavar=_metavar(field),
                    nargs="?" if field.kinds == (bool,) else None,
                    const="true" if field.kinds == (bool,) else None,
                    help=_help(field).replace("%", "%%") if shown else argparse.SUPPRESS,
                )
    return parser


def _metavar(field: Field) -> str:
    if field.spec.choices:
        return "|".join(field.spec.choices)
    if field.kinds == (bool,):
        return "true|false"
    if field.spec.unit and " " not in field.spec.unit:
        return field.spec.unit.upper()
    return "TEXT" if field.kinds == (str,) else "NUMBER"


def _help(field: Field) -> str:
    """`The help text (default: 16 tokens)`."""
    spec, default = field.spec, field.default
    value = str(default).lower() if isinstance(default, bool) else default
    shown = spec.unset if default is None else f"{value} {spec.unit}".strip()
    return f"{spec.help} (default: {shown})".replace("`", "")


def version() -> str:
    """Of this package, as it was installed."""
    try:
        return metadata.version("vibe-sgl-lite")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _from_text(name: str, text: str) -> Any:
    """The typed value of a flag's text; text that does not fit stays text, for `ServerArgs` to refuse by its rules."""
    (kind,) = FLAGS[name].kinds
    try:
        if kind is bool:
            return {"true": True, "false": False}.get(text.lower(), text)
        return kind(text)
    except ValueError:
        return text


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read: {error}", field="config") from error
    if path.suffix == ".toml":
        values = _parse_toml(path, content)
    elif path.suffix in (".yaml", ".yml"):
        values = _parse_yaml(path, content)
    else:
        raise ConfigError(f"--config {path}: the name must end in .yaml, .yml or .toml", field="config")
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"--config {path}: must hold settings as `name: value`, not a list or a text", field="config")
    try:
        make_args(values)
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}", field=error.field) from error
    return {key.replace("-", "_"): value for key, value in values.items()}


def _parse_toml(path: Path, content: str) -> Any:
    try:
        return tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--config {path}: is not valid TOML: {error}", field="config") from error


def _parse_yaml(path: Path, content: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ConfigError(
            f"--config {path}: reading YAML needs pyyaml (pip install 'vibe-sgl-lite[yaml]'); TOML needs nothing",
            field="config",
        ) from error
    try:
        return yaml.safe_load(content) or {}
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"--config {path}: is not valid YAML: {line}", field="config") from error
