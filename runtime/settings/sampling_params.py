"""Sampling parameters: what a caller may ask for, and what a request runs with once the model's defaults are filled in.

`SamplingParams` is the caller's side: a field left out is `UNSET` and takes the model's own value
(generation_config.json), else the default of `DEFAULTS`. `ResolvedSampling` is the engine's side: every field concrete.
Knows nothing of tokenizers, schedulers or tensors.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from vibe_sgl_lite.runtime.errors import RequestError

GREEDY_TEMPERATURE = 1e-6  # at or below: exact argmax
MAX_N = 64
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 128
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024

DEFAULTS: Mapping[str, Any] = {
    "max_new_tokens": 128,
    "temperature": 1.0,
    "top_k": -1,
    "top_p": 1.0,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
    "stop": (),
    "stop_token_ids": (),
    "ignore_eos": False,
    "include_stop": False,
    "skip_special_tokens": True,
    "logit_bias": {},
    "seed": None,
    "n": 1,
    "logprobs": False,
    "top_logprobs": 0,
    "prompt_logprobs": False,
}

# field -> (lowest, highest, lowest is excluded); None is no bound
_RANGES: Mapping[str, tuple[float | None, float | None, bool]] = {
    "max_new_tokens": (1, None, False),
    "temperature": (0.0, 100.0, False),
    "top_p": (0.0, 1.0, True),
    "min_p": (0.0, 1.0, False),
    "frequency_penalty": (-2.0, 2.0, False),
    "presence_penalty": (-2.0, 2.0, False),
    "repetition_penalty": (0.0, 10.0, True),
    "min_new_tokens": (0, None, False),
    "seed": (-(2**63), 2**64 - 1, False),
    "n": (1, MAX_N, False),
    "top_logprobs": (0, MAX_TOP_LOGPROBS, False),
}
_INTS = frozenset({"max_new_tokens", "top_k", "min_new_tokens", "seed", "n", "top_logprobs"})
_FLOATS = frozenset({"temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"})
_BOOLS = frozenset({"ignore_eos", "include_stop", "skip_special_tokens", "logprobs", "prompt_logprobs"})
_NONE_ALLOWED = frozenset({"max_new_tokens", "seed"})


class SamplingParams(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How to sample one request. A field left out takes the model's own default, else the one named here.

    max_new_tokens: tokens to generate at most (128); None means up to the context length.
    temperature: 0 is greedy: the exact argmax, ties to the lowest id (1.0).
    top_k: keep the k most likely tokens; -1 is off (-1).
    top_p: nucleus, the smallest set with at least this mass, 0 < top_p <= 1 (1.0).
    min_p: drop tokens less likely than min_p times the most likely one (0.0).
    frequency_penalty, presence_penalty: over generated tokens, -2..2 (0.0).
    repetition_penalty: over prompt and generated tokens, above 0 (1.0).
    min_new_tokens: end and stop tokens cannot be drawn before that many tokens (0).
    stop: strings that end the text; one string or several (none).
    stop_token_ids: ids that end the output in addition to the model's end tokens (none).
    ignore_eos: go on past the model's end tokens; stop and stop_token_ids still hold (False).
    include_stop: keep the matched stop string in the text (False).
    skip_special_tokens: leave special tokens out of the text (True).
    logit_bias: token id -> number added to its logit (none).
    seed: 64 bits; the output then depends on nothing else in the batch. None draws one and reports it (None).
    n: samples of this prompt (1).
    logprobs, top_logprobs, prompt_logprobs: of the raw model distribution (off).

    Raises RequestError (a ValueError) naming field, value and allowed range.
    """

    max_new_tokens: int | UnsetType | None = UNSET
    temperature: float | UnsetType = UNSET
    top_k: int | UnsetType = UNSET
    top_p: float | UnsetType = UNSET
    min_p: float | UnsetType = UNSET
    frequency_penalty: float | UnsetType = UNSET
    presence_penalty: float | UnsetType = UNSET
    repetition_penalty: float | UnsetType = UNSET
    min_new_tokens: int | UnsetType = UNSET
    stop: str | Sequence[str] | UnsetType = UNSET
    stop_token_ids: Sequence[int] | UnsetType = UNSET
    ignore_eos: bool | UnsetType = UNSET
    include_stop: bool | UnsetType = UNSET
    skip_special_tokens: bool | UnsetType = UNSET
    logit_bias: dict[int, float] | UnsetType = UNSET
    seed: int | UnsetType | None = UNSET
    n: int | UnsetType = UNSET
    logprobs: bool | UnsetType = UNSET
    top_logprobs: int | UnsetType = UNSET
    prompt_logprobs: bool | UnsetType = UNSET

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not UNSET:
                _check(name, value)


class ThinkingRules(msgspec.Struct, array_like=True, frozen=True):
    """How a chat's thinking block is told apart and bounded, in token ids.

    start, end: its tags. inside: the prompt has opened it already; else it begins with the first generated token, or
    there is none. limit: tokens in it, None is any number; when they are spent, `close` is forced, `end` among it.
    tail: what follows `end` in the template, forced before a grammar begins.
    """

    start: int
    end: int
    inside: bool
    limit: int | None
    close: tuple[int, ...]
    tail: tuple[int, ...]


class ResolvedSampling(msgspec.Struct, array_like=True, frozen=True):
    """What one request runs with: every field concrete. `seed` is always set; `max_new_tokens` is a number.

    end_token_ids: the model's end tokens, empty with ignore_eos. thinking: None where nothing depends on the thinking
    block. grammar: what the output must match (runtime/text/grammar.py). Wire rule: new fields at the end, with
    a default.
    """

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    min_new_tokens: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    end_token_ids: tuple[int, ...]
    ignore_eos: bool
    include_stop: bool
    skip_special_tokens: bool
    logit_bias: dict[int, float]
    seed: int
    n: int
    logprobs: bool
    top_logprobs: int
    prompt_logprobs: bool
    thinking: ThinkingRules | None = None
    grammar: str | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature <= GREEDY_TEMPERATURE


def resolve(
    params: SamplingParams,
    *,
    model_defaults: Mapping[str, Any],
    end_token_ids: tuple[int, ...],
    prompt_tokens: int,
    context_length: int,
    vocab_size: int,
) -> ResolvedSampling:
    """Fill in the model's defaults and check what needs the prompt and the model.

    Raises RequestError: prompt + max_new_tokens over the context length, and ids outside the vocabulary.
    """
    values: dict[str, Any] = {}
    for name, default in DEFAULTS.items():
        asked = getattr(params, name)
        values[name] = model_defaults.get(name, default) if asked is UNSET else asked
    room = context_length - prompt_tokens
    if room < 1:
        raise RequestError(
            f"prompt has {prompt_tokens} tokens, context length is {context_length} and one token must be generated: "
            "shorten the prompt or raise --context-length",
            field="prompt",
        )
    if values["max_new_tokens"] is None:
        values["max_new_tokens"] = room
    elif values["max_new_tokens"] > room:
        raise RequestError(
            f"max_new_tokens={values['max_new_tokens']} with a prompt of {prompt_tokens} tokens passes the context "
            f"length of {context_length}: ask for at most {room}, or pass None for as many as fit",
            field="max_new_tokens",
        )
    if values["min_new_tokens"] > values["max_new_tokens"]:
        raise RequestError(
            f"min_new_tokens={values['min_new_tokens']} is above max_new_tokens={values['max_new_tokens']}",
            field="min_new_tokens",
        )
    if isinstance(values["stop"], str):
        values["stop"] = (values["stop"],)
    values["stop"] = tuple(values["stop"])
    values["stop_token_ids"] = tuple(values["stop_token_ids"])
    values["logit_bias"] = dict(values["logit_bias"])
    for name in ("stop_token_ids", "logit_bias"):
        for token_id in values[name]:
            if not 0 <= token_id < vocab_size:
                raise RequestError(f"{name}: id {token_id} is outside the vocabulary, 0..{vocab_size - 1}", field=name)
    if values["top_logprobs"] > 0:
        values["logprobs"] = True
    seed = values["seed"]
    values["seed"] = secrets.randbits(64) if seed is None else seed % 2**64
    values["end_token_ids"] = () if values["ignore_eos"] else end_token_ids
    return ResolvedSampling(**values)


def _check(name: str, value: Any) -> None:
    if value is None and name in _NONE_ALLOWED:
        return
    if name in _BOOLS:
        if not isinstance(value, bool):
            raise _bad(name, value, "must be True or False")
    elif name in _INTS:
        if isinstance(value, bool) or not isinstance(value, int):
            raise _bad(name, value, "must be a whole number")
        if name == "top_k" and value != -1 and value < 1:
            raise _bad(name, value, "must be -1 (off) or 1 and above")
        _check_range(name, value)
    elif name in _FLOATS:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise _bad(name, value, "must be a finite number")
        _check_range(name, value)
    elif name == "stop":
        _check_stop(value)
    elif name == "stop_token_ids":
        if not isinstance(value, list | tuple) or any(isinstance(v, bool) or not isinstance(v, int) for v in value):
            raise _bad(name, value, "must be a list of token ids")
        if len(value) > MAX_STOP_TOKEN_IDS:
            raise _bad(name, f"{len(value)} ids", f"may have at most {MAX_STOP_TOKEN_IDS} ids")
    else:
        _check_logit_bias(value)


def _check_range(name: str, value: float) -> None:
    low, high, open_low = _RANGES.get(name, (None, None, False))
    too_low = low is not None and (value <= low if open_low else value < low)
    if too_low or (high is not None and value > high):
        bounds = f"{'above' if open_low else 'at least'} {low}" + ("" if high is None else f" and at most {high}")
        raise _bad(name, value, f"must be {bounds}")


def _check_stop(value: Any) -> None:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or any(not isinstance(s, str) for s in stops):
        raise _bad("stop", value, "must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise _bad("stop", f"{len(stops)} strings", f"may have at most {MAX_STOPS} strings")
    for s in stops:
        if not 0 < len(s) <= MAX_STOP_CHARS:
            raise _bad("stop", s[:40], f"each string must have 1 to {MAX_STOP_CHARS} characters")


def _check_logit_bias(value: Any) -> None:
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIAS:
        raise _bad("logit_bias", type(value).__name__, f"must be a dict of at most {MAX_LOGIT_BIAS} entries")
    for token_id, bias in value.items():
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise _bad("logit_bias", token_id, "keys must be token ids")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -1000.0 <= bias <= 1000.0:
            raise _bad("logit_bias", bias, "values must be numbers from -1000 to 1000")


def _bad(name: str, value: Any, what: str) -> RequestError:
    return RequestError(f"{name}={value!r}: {what}", field=name)
