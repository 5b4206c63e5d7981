"""Sampling parameters: what a caller may ask for, and what a request runs with once the model's defaults are filled in.

`SamplingParams` is the caller's side, a table of what each means and takes: a field left out is `UNSET` and takes the
model's own value (generation_config.json), else the default of its `Spec`. `ResolvedSampling` is the engine's side:
every field concrete. Knows nothing of tokenizers, schedulers or tensors.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, UnsetType

from vibe_sgl_lite.runtime.errors import ContextLengthError, RequestError
from vibe_sgl_lite.runtime.settings.schema import Spec, Unfit, our_names, settle, table

MAX_N = 64
MAX_TOKENS = 2**31 - 1  # numbers of tokens and token ids are int32 on their way to the ranks
GREEDY_TEMPERATURE = 1e-6  # at or below: exact argmax


class _Constructor(type(msgspec.Struct)):  # type: ignore[misc]
    """Unknown names are refused as every bad field is, and aliases are taken."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        if args:
            raise RequestError("SamplingParams takes its fields by name, as temperature=0", field="sampling_params")
        if not values.keys() <= set(cls.__struct_fields__):
            values = our_names(values, cls, "sampling parameter", RequestError)
        return super().__call__(**values)


class SamplingParams(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, metaclass=_Constructor):
    """How to sample one request. A field left out takes the model's own default, else the one named in its Spec.

    Raises RequestError (a ValueError) naming field, value and what is allowed.
    """

    # fmt: off
    max_new_tokens: Annotated[int | UnsetType | None, Spec(
        "tokens to generate at most; more than fit are refused, never clipped",
        more="The default is for plain prompts; in chats it is `None`.", default=128, low=1, high=MAX_TOKENS,
        allowed="at least 1, and with the prompt at most the context length; `None` is as many as context and KV "
        "cache allow",
        aliases=("max_tokens", "max_completion_tokens"), like=("num_predict", "n_predict", "max_length"),
    )] = UNSET
    temperature: Annotated[float | UnsetType, Spec(
        "0 is greedy: the exact argmax, ties to the lowest id",
        default=1.0, low=0, high=100, like=("do_sample",),
    )] = UNSET
    top_k: Annotated[int | UnsetType, Spec(
        "keep the k most likely tokens",
        default=-1, low=-1, high=MAX_TOKENS, allowed="-1 or 0 (off), or 1 and above",
    )] = UNSET
    top_p: Annotated[float | UnsetType, Spec(
        "keep the smallest set with at least this mass, after `top_k`",
        default=1.0, low=0, high=1, above_low=True,
    )] = UNSET
    min_p: Annotated[float | UnsetType, Spec(
        "drop tokens less likely than this times the most likely one",
        default=0.0, low=0, high=1,
    )] = UNSET
    frequency_penalty: Annotated[float | UnsetType, Spec(
        "times how often a token was generated, off its logit",
        default=0.0, low=-2, high=2,
    )] = UNSET
    presence_penalty: Annotated[float | UnsetType, Spec(
        "off the logit of every token that was generated",
        default=0.0, low=-2, high=2,
    )] = UNSET
    repetition_penalty: Annotated[float | UnsetType, Spec(
        "divides positive and multiplies negative logits of tokens in prompt and output",
        default=1.0, low=0, high=10, above_low=True, like=("repeat_penalty",),
    )] = UNSET
    min_new_tokens: Annotated[int | UnsetType, Spec(
        "end and stop tokens cannot be drawn before",
        default=0, low=0, high=MAX_TOKENS, allowed="at least 0 and at most `max_new_tokens`", aliases=("min_tokens",),
    )] = UNSET
    stop: Annotated[str | Sequence[str] | UnsetType, Spec(
        "texts that end the output, also across tokens; one or several",
        default=(), items=16, chars=256, aliases=("stop_sequences",), like=("stop_strings",),
    )] = UNSET
    stop_token_ids: Annotated[Sequence[int] | UnsetType, Spec(
        "end the output in addition to the model's end tokens",
        more="The one that did is in `token_ids`, not in `text`, as in vLLM.", default=(), items=128, low=0,
        high=MAX_TOKENS, like=("eos_token_id",),
    )] = UNSET
    ignore_eos: Annotated[bool | UnsetType, Spec(
        "go on past the model's end tokens; `stop` and `stop_token_ids` still hold",
        default=False,
    )] = UNSET
    include_stop: Annotated[bool | UnsetType, Spec(
        "keep the matched stop string, or the stop token's text, in the text",
        default=False, aliases=("include_stop_str_in_output",), like=("no_stop_trim",),
    )] = UNSET
    skip_special_tokens: Annotated[bool | UnsetType, Spec("leave special tokens out of the text", default=True)] = UNSET
    logit_bias: Annotated[dict[int, float] | UnsetType, Spec(
        "token id -> number added to its logit",
        default={}, items=1024, low=-1000, high=1000,
    )] = UNSET
    seed: Annotated[int | UnsetType | None, Spec(
        "the output then depends on nothing else in the batch; `None` draws one and reports it",
        default=None, low=-(2**63), high=2**64 - 1, allowed="64 bits", aliases=("sampling_seed",),
    )] = UNSET
    n: Annotated[int | UnsetType, Spec(
        "samples of the prompt; sample i has seed + i",
        default=1, low=1, high=MAX_N, aliases=("num_return_sequences",),
    )] = UNSET
    logprobs: Annotated[bool | UnsetType, Spec(
        "of each generated token",
        default=False, allowed="`top_logprobs` is the number of alternatives",
    )] = UNSET
    top_logprobs: Annotated[int | UnsetType, Spec(
        "and of that many alternatives; turns `logprobs` on",
        default=0, low=0, high=20, like=("n_probs", "top_logprobs_num", "return_logprob"),
    )] = UNSET
    prompt_logprobs: Annotated[bool | UnsetType, Spec(
        "of the prompt's tokens, with `top_logprobs` alternatives",
        default=False, allowed="`top_logprobs` is the number of alternatives",
    )] = UNSET

    timeout_s: Annotated[float | UnsetType | None, Spec(
        "so long after its arrival the request ends as an error, code `deadline`; `None` is never",
        default=None, unit="seconds", low=0, high=10_000_000, above_low=True, like=("max_time",),
    )] = UNSET
    allow_special_tokens: Annotated[bool | UnsetType, Spec(
        "in chats: special tokens written in the messages count as such; else they are text",
        default=False,
    )] = UNSET
    # fmt: on

    def __post_init__(self) -> None:
        settle(self, _refusal)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set; `SamplingParams(**params.to_dict())` is equal."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not UNSET}

    def __repr__(self) -> str:
        return f"SamplingParams({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"


FIELDS = table(SamplingParams)
DEFAULTS: Mapping[str, Any] = {name: field.default for name, field in FIELDS.items()}


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


class Pooling(msgspec.Struct, array_like=True, frozen=True):
    """What a request wants of its last token in place of new ones, computed by the ranks (model_worker/pooling.py).

    dimensions: the first so many values of the final hidden state, as a vector of length 1. labels: instead of it, the
    probabilities that these tokens come next, against each other alone.
    """

    dimensions: int
    labels: tuple[int, ...] = ()


class ResolvedSampling(msgspec.Struct, array_like=True, frozen=True):
    """What one request runs with: every field concrete. `seed` is always set; `max_new_tokens` is a number.

    end_token_ids: the model's end tokens, empty with ignore_eos. thinking: None where nothing depends on the thinking
    block. grammar: what the output must match (runtime/text/grammar.py). pooling: of a request that ends with its
    prompt; then nothing is sampled. Wire rule: new fields at the end, with a default.
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
    timeout_s: float | None = None
    allow_special_tokens: bool = False
    pooling: Pooling | None = None

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
    pool_tokens: int | None = None,
) -> ResolvedSampling:
    """Fill in the model's defaults and check what needs the prompt and the model.

    pool_tokens: of the whole KV pool, where it is known; max_new_tokens=None keeps within it. A default of the model's
    that is more than what fits gives way.

    Raises RequestError: prompt + max_new_tokens over the context length, and ids outside the vocabulary.
    """
    values: dict[str, Any] = {}
    for name, default in DEFAULTS.items():
        asked = getattr(params, name)
        values[name] = model_defaults.get(name, default) if asked is UNSET else asked
    room = context_length - prompt_tokens
    if room < 1:
        raise ContextLengthError(
            f"prompt has {prompt_tokens} tokens, context length is {context_length} and one token must be generated: "
            "shorten the prompt or raise --context-length",
            field="prompt",
        )
    if values["max_new_tokens"] is None:
        in_pool = room if pool_tokens is None else pool_tokens - prompt_tokens + 1  # the last token needs no place
        values["max_new_tokens"] = max(1, min(room, in_pool))
    elif params.max_new_tokens is UNSET and "max_new_tokens" in model_defaults:
        values["max_new_tokens"] = min(values["max_new_tokens"], room)
    elif values["max_new_tokens"] > room:
        raise ContextLengthError(
            f"max_new_tokens={values['max_new_tokens']} with a prompt of {prompt_tokens} tokens passes the context "
            f"length of {context_length}: ask for at most {room}, or pass None for as many as fit",
            field="max_new_tokens",
        )
    if values["min_new_tokens"] > values["max_new_tokens"]:
        raise RequestError(
            f"min_new_tokens={values['min_new_tokens']} is above max_new_tokens={values['max_new_tokens']}",
            field="min_new_tokens",
        )
    for name in ("stop_token_ids", "logit_bias"):
        for token_id in values[name]:
            if not 0 <= token_id < vocab_size:
                raise RequestError(f"{name}: id {token_id} is outside the vocabulary, 0..{vocab_size - 1}", field=name)
    values["top_k"] = values["top_k"] or -1  # both are off
    if values["top_logprobs"] > 0:
        values["logprobs"] = True
    seed = values["seed"]
    values["seed"] = secrets.randbits(64) if seed is None else seed % 2**64
    values["end_token_ids"] = () if values["ignore_eos"] else end_token_ids
    return ResolvedSampling(**values)


def _refusal(name: str, unfit: Unfit) -> RequestError:
    return RequestError(f"{name}={unfit.value}: {unfit.problem}", field=name)
