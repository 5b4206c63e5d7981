"""The command line of `launch.py`: flags and `--config FILE` to one `ServerArgs`, and the text of `--help`."""

from __future__ import annotations

import argparse
import difflib
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.settings.server_args import FLAGS, Flag, ServerArgs, flag_name, make_args

DESCRIPTION = "Serve a Qwen3 model. Prints one line on stdout when ready; logs go to stderr; Ctrl-C stops it."
CONFIG_HELP = "YAML or TOML file with the same settings, names with dashes or underscores; flags win over it"


def parse(argv: Sequence[str]) -> ServerArgs:
    """The settings of a command line. Raises ConfigError; `--help` and `--version` print and raise SystemExit(0)."""
    parser = _make_parser()
    flags, unknown = parser.parse_known_args(list(argv))
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser.known_flags(), n=1)
        hint = f"did you mean {near[0]}?" if near else "see --help"
        raise ConfigError(f"{unknown[0]} is not a flag; {hint}")
    given: dict[str, Any] = vars(flags)
    config = given.pop("config", None)
    values: dict[str, Any] = {} if config is None else _read_config(Path(config))
    values.update({name: _from_text(name, text) for name, text in given.items()})
    return make_args(values)


class _Parser(argparse.ArgumentParser):
    """Errors are raised instead of printed with a usage text, so that the user sees one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))

    def known_flags(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]


def _make_parser() -> _Parser:
    parser = _Parser(prog="vibe-sgl-lite", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=CONFIG_HELP)
    for field in msgspec.structs.fields(ServerArgs):
        flag = FLAGS[field.name]
        parser.add_argument(
            flag_name(field.name),
            dest=field.name,
            default=argparse.SUPPRESS,
            metavar=_metavar(flag, field.type),
            nargs="?" if field.type is bool else None,
            const="true" if field.type is bool else None,
            help=_help(flag, field.default).replace("%", "%%"),
        )
    return parser


def _metavar(flag: Flag, kind: Any) -> str:
    if flag.choices:
        return "|".join(flag.choices)
    if kind is bool:
        return "true|false"
    if flag.unit and " " not in flag.unit:
        return flag.unit.upper()
    return "TEXT" if "str" in str(kind) else "NUMBER"


def _help(flag: Flag, default: Any) -> str:
    """`The help text (default: 16 tokens)`."""
    if default is None:
        shown = flag.unset
    elif isinstance(default, bool):
        shown = str(default).lower()
    else:
        shown = f"{default} {flag.unit}".strip()
    return f"{flag.help} (default: {shown})"


def _version() -> str:
    try:
        return metadata.version("vibe-sgl-lite")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _from_text(name: str, text: str) -> Any:
    """The typed value of a flag's text; text that does not fit stays text, for `ServerArgs` to refuse by its rules."""
    kind = next(field.type for field in msgspec.structs.fields(ServerArgs) if field.name == name)
    if "str" in str(kind):
        return text
    try:
        if kind is bool:
            return {"true": True, "false": False}.get(text.lower(), text)
        return float(text) if "float" in str(kind) else int(text)
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
