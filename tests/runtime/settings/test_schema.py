"""What every field does with values of other libraries: taken where they convert exactly, else refused by name."""

from __future__ import annotations

import json
from array import array
from enum import IntEnum
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from vibe_sgl_lite.runtime.errors import ConfigError, RequestError
from vibe_sgl_lite.runtime.settings.sampling_params import FIELDS, ResolvedSampling, SamplingParams
from vibe_sgl_lite.runtime.settings.server_args import FLAGS, ServerArgs

PLAIN = {
    "max_new_tokens": 5,
    "temperature": 0.5,
    "n": 3,
    "seed": 2**63,
    "ignore_eos": True,
    "stop": ("x",),
    "stop_token_ids": (1, 2),
    "logit_bias": {5: 1.0},
}


class Five(IntEnum):
    FIVE = 5


VALUES: dict[str, list[Any]] = {
    "max_new_tokens": [np.int64(5), np.array(5), Five.FIVE, torch.tensor(5)],
    "temperature": [np.float64(0.5), np.float32(0.5), np.linspace(0, 1, 3)[1], Fraction(1, 2), torch.tensor(0.5)],
    "n": [np.uint8(3)],
    "seed": [np.uint64(2**63)],
    "ignore_eos": [np.bool_(True)],
    "stop": [np.str_("x"), [np.str_("x")], np.array(["x"]), ("x",), "x"],
    "stop_token_ids": [np.array([1, 2]), [np.int32(1), 2], torch.tensor([1, 2]), range(1, 3), array("i", [1, 2])],
    "logit_bias": [{np.int64(5): np.float64(1)}, {5: 1}, MappingProxyType({5: Fraction(1)})],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in VALUES.items() for value in values])
def test_other_libraries_values_become_plain_ones(field: str, value: Any) -> None:
    params = SamplingParams(**{field: value})
    taken = getattr(params, field)
    assert taken == PLAIN[field]
    assert type(taken) is type(PLAIN[field])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 2**70),
        pytest.param("max_new_tokens", 10**5000, id="digits"),
        ("max_new_tokens", np.float64(5)),
        ("max_new_tokens", np.array([5, 6])),
        ("temperature", 10**400),
        ("temperature", Fraction(1, 3)),
        ("temperature", np.float64("inf")),
        ("temperature", 1j),
        ("temperature", np.array([0.5])),
        ("temperature", np.bool_(True)),
        ("seed", 2**70),
        ("seed", -(2**63) - 1),
        ("top_k", 2**40),
        ("ignore_eos", np.int64(1)),
        ("stop", "\ud800"),
        ("stop", ["x", "a\udfff"]),
        ("stop", b"x"),
        ("stop", {"x"}),
        ("stop", np.array(5)),
        ("stop_token_ids", [2**40]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", np.array([1.0])),
        ("stop_token_ids", "12"),
        ("stop_token_ids", 5),
        ("logit_bias", {2**70: 1.0}),
        ("logit_bias", {1: 10**400}),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", {True: 1.0}),
        ("logit_bias", {None: 1.0}),
        ("logit_bias", [1.0]),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
    ],
)
def test_what_does_not_convert_exactly_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field
    assert len(str(caught.value)) < 300
    assert str(caught.value).encode()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param("page_size", 10**5000, id="digits"),
        ("page_size", np.array([1, 2])),
        ("step_timeout", 10**400),
        ("step_timeout", 1j),
        ("model_path", "\ud800"),
        ("model_path", b"/m"),
        ("name", 5),
        ("address", 5),
        ("dist_init_addr", 5),
        ("disable_overlap", np.int64(1)),
    ],
)
def test_settings_too(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerArgs(**{field: value})
    assert caught.value.field == field
    assert "\n" not in str(caught.value)
    assert str(caught.value).encode()
    numpys: dict[str, Any] = {"page_size": np.int64(4), "step_timeout": np.float32(2)}
    assert ServerArgs(**numpys) == ServerArgs(page_size=4, step_timeout=2.0)


def test_every_number_is_bounded_to_what_travels() -> None:
    """msgpack has 64 bits; the ranks' tables int32 and float32."""
    for field in (*FIELDS.values(), *FLAGS.values()):
        if {int, float, list[int], dict[int, float]} & set(field.kinds):
            assert field.spec.low is not None, field.name
            assert field.spec.high is not None, field.name
            assert -(2**63) <= field.spec.low <= field.spec.high < 2**64, field.name


def test_defaults_are_allowed_values() -> None:
    for field in (*FIELDS.values(), *FLAGS.values()):
        assert field.take(field.default) == field.default, field.name


def test_everything_that_can_be_set_is_resolved() -> None:
    """The two structs have the same fields, so that none is lost on the way."""
    fields = set(ResolvedSampling.__struct_fields__)
    assert fields - set(SamplingParams.__struct_fields__) == {"end_token_ids", "thinking", "grammar", "pooling"}
    assert set(SamplingParams.__struct_fields__) <= fields
    assert list(FIELDS) == list(SamplingParams.__struct_fields__)


def test_names_that_other_engines_have_for_the_same() -> None:
    theirs: Any = {"max_tokens": 5, "min_tokens": 2}
    assert SamplingParams(**theirs) == SamplingParams(max_new_tokens=5, min_new_tokens=2)
    with pytest.raises(RequestError, match="max_new_tokens is set twice"):
        SamplingParams(**theirs, max_new_tokens=5)


def test_params_are_readable_and_go_to_json_and_back() -> None:
    params = SamplingParams(temperature=0, stop="x", logit_bias={5: 1}, max_new_tokens=None)
    assert repr(params) == "SamplingParams(max_new_tokens=None, temperature=0.0, stop=('x',), logit_bias={5: 1.0})"
    assert repr(SamplingParams()) == "SamplingParams()"
    assert SamplingParams(**params.to_dict()) == params
    params = SamplingParams(temperature=0, stop=["x", "y"], seed=2**64 - 1)
    assert SamplingParams(**json.loads(json.dumps(params.to_dict()))) == params
