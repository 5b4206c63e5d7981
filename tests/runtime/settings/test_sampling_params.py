"""SamplingParams: what is refused, and how unset fields are resolved (docs/sampling.md)."""

from typing import Any

import msgspec
import pytest

from vibe_sgl_lite.runtime.errors import RequestError
from vibe_sgl_lite.runtime.settings.sampling_params import DEFAULTS, FIELDS, ResolvedSampling, SamplingParams, resolve


def resolved(params: SamplingParams, **changes: Any) -> ResolvedSampling:
    arguments: dict[str, Any] = {
        "model_defaults": {},
        "end_token_ids": (7, 8),
        "prompt_tokens": 10,
        "context_length": 1000,
        "vocab_size": 100,
    }
    return resolve(params, **(arguments | changes))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_k", -2),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("min_new_tokens", -1),
        ("stop", ""),
        ("stop", ["ok", 3]),
        ("stop", ["x"] * 17),
        ("stop", "x" * 257),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", [1] * 129),
        ("ignore_eos", 1),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {1: float("inf")}),
        ("seed", 2**64),
        ("n", 0),
        ("n", 65),
        ("top_logprobs", 21),
        ("prompt_logprobs", "yes"),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field


def test_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match=r"temperatur is not a sampling parameter; did you mean temp") as caught:
        SamplingParams(temperatur=1.0)  # type: ignore[call-arg]
    assert caught.value.field == "temperatur"
    with pytest.raises(RequestError, match="by name"):
        SamplingParams(5)  # type: ignore[call-arg]
    with pytest.raises(msgspec.ValidationError, match="temperatur"):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"temperatur": 1.0}), type=SamplingParams)


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if not field.optional])
def test_none_is_as_if_left_out(name: str) -> None:
    """vLLM's and OpenAI's defaults are None; where None means something here, it stays."""
    assert SamplingParams(**dict[str, Any]({name: None})) == SamplingParams()
    assert SamplingParams(**dict[str, Any]({name: None})).to_dict() == {}


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.optional])
def test_none_with_a_meaning_stays(name: str) -> None:
    assert SamplingParams(**dict[str, Any]({name: None})).to_dict() == {name: None}


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_that_is_off(top_k: int) -> None:
    """0 in transformers, llama.cpp and newer vLLM, -1 in SGLang and older vLLM; it wins over the model's own."""
    assert resolved(SamplingParams(top_k=top_k), model_defaults={"top_k": 20}).top_k == -1


def test_keys_of_logit_bias_may_be_json_s() -> None:
    assert SamplingParams(logit_bias={"5": 1, 6: 2}).logit_bias == {5: 1.0, 6: 2.0}  # type: ignore[dict-item]


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_a_number_of_logprobs_is_told_where_it_goes(name: str) -> None:
    with pytest.raises(RequestError, match=f"^{name}=5: must be true or false; top_logprobs is the number of alt"):
        SamplingParams(**dict[str, Any]({name: 5}))


def test_only_set_fields_travel_and_survive() -> None:
    params = SamplingParams(temperature=0, stop=("a", "b"), max_new_tokens=None)
    frame = msgspec.msgpack.encode(params)
    assert set(msgspec.msgpack.decode(frame)) == {"temperature", "stop", "max_new_tokens"}
    again = msgspec.msgpack.decode(frame, type=SamplingParams)
    assert resolved(again, model_defaults={}).stop == ("a", "b")


def test_unset_takes_the_models_value_then_the_default() -> None:
    got = resolved(SamplingParams(top_p=0.5, seed=3), model_defaults={"top_p": 0.9, "top_k": 20})
    assert (got.top_p, got.top_k, got.temperature) == (0.5, 20, DEFAULTS["temperature"])
    assert got.seed == 3


def test_max_new_tokens_is_never_clipped_silently() -> None:
    assert resolved(SamplingParams(max_new_tokens=990)).max_new_tokens == 990
    with pytest.raises(RequestError, match="at most 990"):
        resolved(SamplingParams(max_new_tokens=991))
    assert resolved(SamplingParams(max_new_tokens=None)).max_new_tokens == 990


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(RequestError, match="1000 tokens") as caught:
        resolved(SamplingParams(), prompt_tokens=1000)
    assert caught.value.field == "prompt"


def test_ignore_eos_drops_end_tokens_but_no_stop_tokens() -> None:
    got = resolved(SamplingParams(ignore_eos=True, stop_token_ids=[5]))
    assert (got.end_token_ids, got.stop_token_ids) == ((), (5,))
    assert resolved(SamplingParams()).end_token_ids == (7, 8)


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(RequestError, match=r"100.*0\.\.99"):
        resolved(SamplingParams(stop_token_ids=[100]))


def test_a_seed_is_always_there_and_negative_ones_wrap() -> None:
    assert resolved(SamplingParams()).seed != resolved(SamplingParams()).seed
    assert resolved(SamplingParams(seed=-1)).seed == 2**64 - 1


def test_the_models_repetition_penalty_is_the_default() -> None:
    got = resolved(SamplingParams(), model_defaults={"repetition_penalty": 1.1})
    assert got.repetition_penalty == 1.1
    assert (
        resolved(SamplingParams(repetition_penalty=1.0), model_defaults={"repetition_penalty": 1.1}).repetition_penalty
        == 1.0
    )


def test_asking_for_alternatives_asks_for_logprobs() -> None:
    assert resolved(SamplingParams(top_logprobs=2)).logprobs is True
    assert resolved(SamplingParams(top_logprobs=0)).logprobs is False


def test_more_tokens_at_least_than_at_most_are_refused() -> None:
    with pytest.raises(RequestError, match="min_new_tokens=6 is above max_new_tokens=5"):
        resolved(SamplingParams(min_new_tokens=6, max_new_tokens=5))
