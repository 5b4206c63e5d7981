"""The Python API as a page's text, from signatures and docstrings; docs/tables.py puts it into docs/api.md."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import vibe_sgl_lite
from vibe_sgl_lite.runtime import errors


def class_reference(name: str, *, inherited: bool) -> Iterator[str]:
    """One public class: its docstring, then its methods and properties by name, those that it inherits on request."""
    cls = getattr(vibe_sgl_lite, name)
    yield f"\n### {name}\n"
    if cls.__init__ is not object.__init__ and not hasattr(cls, "__struct_fields__"):
        yield f"`{_signature(name, cls.__init__)}`\n"
    yield _text(cls)
    bases = [base for base in cls.__mro__ if base.__module__.startswith("vibe_sgl_lite")] if inherited else [cls]
    for member in sorted({member for base in bases for member in vars(base)}):
        value = inspect.getattr_static(cls, member)
        if member.startswith("_") or not inspect.getdoc(value):
            continue
        if isinstance(value, property) or not callable(value):
            yield f"\n**`{name}.{member}`**\n\n{_text(value)}"
        else:
            yield f"\n**`{_signature(f'{name}.{member}', value)}`**\n\n{_text(value)}"


def error_reference() -> Iterator[str]:
    """Every error with its code, its parents and when it comes."""
    yield "| error | code | is also | when |\n|---|---|---|---|"
    for name in sorted(vibe_sgl_lite.__all__):
        cls = getattr(vibe_sgl_lite, name)
        if isinstance(cls, type) and issubclass(cls, errors.VibeError):
            parents = ", ".join(f"`{base.__name__}`" for base in cls.__bases__)
            yield f"| `{name}` | `{cls.code}` | {parents} | {' '.join(_text(cls).split())} |"


def _signature(name: str, function: Any) -> str:
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values()]
    shown = str(inspect.Signature([p for p in parameters if p.name != "self"]))
    return name + re.sub(r"<[^>]*>", "...", shown)


def _text(thing: Any) -> str:
    return inspect.getdoc(thing) or ""
