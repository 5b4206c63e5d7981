"""The table of sampling parameters: what each means, its default, and which values it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import UNSET, UnsetType

from vibe_sgl_lite.runtime.settings.schema import Spec

MAX_N = 64
MAX_TOKENS = 2**31 - 1  # numbers of tokens and token ids are int32 on their way to the ranks


class SamplingFields(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What `SamplingParams` (sampling_params.py) has."""

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
