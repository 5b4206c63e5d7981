"""Bodies of OpenAI's API, as far as they are taken, with the fields that vLLM and SGLang add."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(msgspec.Struct):
    schema: dict[str, Any] | bool | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's. json: a schema, as an object or as text. grammar: Lark's syntax, as llguidance reads it."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class CommonBody(msgspec.Struct, kw_only=True):
    """What chats and completions share. min_tokens, top_k and so on are those of docs/sampling.md."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    regex: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None


class FunctionDefinition(msgspec.Struct):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    function: FunctionDefinition
    type: Literal["function"] = "function"


class FunctionName(msgspec.Struct):
    name: str


class NamedTool(msgspec.Struct):
    function: FunctionName
    type: Literal["function"] = "function"


class ChatBody(CommonBody, kw_only=True):
    """`POST /v1/chat/completions`. Messages are checked one by one (chat_messages.py)."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    thinking_token_budget: int | None = None
    include_reasoning: bool | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None


class CompletionBody(CommonBody, kw_only=True):
    """`POST /v1/completions`. prompt: a text, token ids, or several of either kind."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None


# Not supported, names of our other interfaces and of other engines among them; each with values besides null, false and
# empty ones that ask for nothing.
REFUSED: dict[str, tuple[object, ...]] = {
    "add_special_tokens": (True,),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": (),
    "best_of": (1,),
    "chat_template": (),
    "choice": (),
    "custom_logit_processor": (),
    "custom_params": (),
    "documents": (),
    "dry_multiplier": (),
    "dynatemp_range": (),
    "ebnf": (),
    "echo": (),
    "function_call": ("none",),
    "functions": (),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop": (),
    "json_schema": (),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": (),
    "lora": (),
    "lora_path": (),
    "max_new_tokens": (),
    "max_thinking_tokens": (),
    "min_new_tokens": (),
    "mirostat": (),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "n_predict": (-1,),
    "n_probs": (),
    "no_stop_trim": (),
    "num_beams": (1,),
    "num_predict": (-1,),
    "options": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "repeat_penalty": (1,),
    "return_hidden_states": (),
    "return_tokens_as_token_ids": (),
    "sampling_seed": (),
    "separate_reasoning": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_regex": (),
    "stop_sequences": (),
    "stop_strings": (),
    "stream_reasoning": (True,),
    "suffix": (),
    "tfs_z": (1,),
    "thinking_budget": (),
    "timeout_s": (),
    "top_logprobs_num": (),
    "top_n_sigma": (-1,),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "xtc_probability": (),
}
_FORM = "response_format or structured_outputs"
# What is meant by some of them, under the names that are taken.
INSTEAD: dict[str, str] = {
    **dict.fromkeys(("max_new_tokens", "n_predict", "num_predict"), "max_tokens"),
    **dict.fromkeys(("guided_json", "guided_choice", "guided_regex", "guided_grammar", "json_schema"), _FORM),
    **dict.fromkeys(("choice", "grammar", "ebnf"), "structured_outputs"),
    **dict.fromkeys(("stop_sequences", "stop_strings"), "stop"),
    **dict.fromkeys(("max_thinking_tokens", "thinking_budget"), "thinking_token_budget"),
    **dict.fromkeys(("n_probs", "top_logprobs_num"), "logprobs and top_logprobs"),
    "functions": "tools",
    "function_call": "tool_choice",
    **dict.fromkeys(("include_stop", "no_stop_trim"), "include_stop_str_in_output"),
    "min_new_tokens": "min_tokens",
    "options": "fields of their own",
    "repeat_penalty": "repetition_penalty",
    "sampling_seed": "seed",
}
# These change nothing of an answer.
IGNORED = frozenset(
    {
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
