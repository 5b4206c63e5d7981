"""docs/migration.md: what is called taken is taken, and for the rest the message names ours."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from vibe_sgl_lite.runtime.errors import ConfigError, RequestError
from vibe_sgl_lite.runtime.settings.elsewhere import ABSENT
from vibe_sgl_lite.runtime.settings.sampling_params import FIELDS, SamplingParams
from vibe_sgl_lite.runtime.settings.server_args import FLAGS, flag_name, make_args

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "migration.md").read_text()
EXAMPLES: dict[tuple[Any, ...], Any] = {
    (int,): 2, (float,): 0.5, (bool,): True, (str,): "host:1", (str, list[str]): ("x",), (list[int],): (5,),
}  # fmt: skip
TOGETHER: dict[str, dict[str, Any]] = {  # what a setting does not go without
    "dist_init_addr": {"nnodes": 2, "tp": 2},
    "ssl_keyfile": {"ssl_certfile": "x.pem"},
}
ROW = re.compile(r"^\| `(?:--)?([\w-]+)` \| [^|]+ \| `(?:--)?([\w-]+)` \| (taken|near)", re.M)


def rows(table: str) -> list[tuple[str, str, str]]:
    """(theirs, ours, taken or near), with underscores."""
    text = PAGE.split(f"<!-- names: {table} -->")[1].split("<!-- end -->")[0]
    found = [(theirs.replace("-", "_"), ours.replace("-", "_"), how) for theirs, ours, how in ROW.findall(text)]
    assert len(found) == text.count("\n| `")
    return found


@pytest.mark.parametrize(("theirs", "ours", "how"), rows("flags"))
def test_flags(theirs: str, ours: str, how: str) -> None:
    field = FLAGS[ours]
    value = field.spec.choices[-1] if field.spec.choices else EXAMPLES[field.kinds]
    if how == "taken":
        assert getattr(make_args({theirs: value} | TOGETHER.get(ours, {})), ours) == value
    else:
        with pytest.raises(ConfigError, match=f"^{theirs} is not a setting; {ours} is the nearest to it"):
            make_args({theirs: value})


@pytest.mark.parametrize(("theirs", "ours", "how"), rows("sampling"))
def test_sampling(theirs: str, ours: str, how: str) -> None:
    value = EXAMPLES[FIELDS[ours].kinds]
    if how == "taken":
        assert getattr(SamplingParams(**{theirs: value}), ours) == value
    else:
        with pytest.raises(RequestError, match=f"^{theirs} is not a sampling parameter; {ours} is the nearest to it"):
            SamplingParams(**{theirs: value})


def test_every_name_that_is_taken_or_hinted_at_is_told() -> None:
    told = {theirs for table in ("flags", "sampling") for theirs, _, _ in rows(table)}
    known = {
        name
        for fields in (FLAGS, FIELDS)
        for field in fields.values()
        for name in (*field.spec.aliases, *field.spec.like)
    }
    variants = {"m", "c", "t", "ngl", "np", "max_seq_len", "n_ctx", "no_enable_prefix_caching", "disable_log_requests"}
    assert known - told <= variants, "variants of a spelling"


@pytest.mark.parametrize("name", ABSENT)
def test_what_has_no_counterpart_is_refused_with_what_to_do(name: str) -> None:
    """And no name is a field's as well, by which it would be hidden."""
    said = re.escape(ABSENT[name])
    with pytest.raises(ConfigError, match=f"^{name} is not a setting; {said}$"):
        make_args({name: 1})
    with pytest.raises(RequestError, match=f"^{name} is not a sampling parameter; {said}$"):
        SamplingParams(**dict[str, Any]({name: 1}))


def test_flags_that_are_named_exist() -> None:
    ours = {flag_name(name) for name in FLAGS}
    for name in re.findall(r"`(--[\w-]+)`", PAGE.split("The same name and meaning")[1]):
        assert name in ours
