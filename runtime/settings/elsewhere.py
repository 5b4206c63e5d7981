"""Names that people bring from other engines and that have no counterpart here: what to say of each.

Names that mean the same, or nearly, are `aliases` and `like` of a field's `Spec`. docs/migration.md shows all of them.
"""

from __future__ import annotations

_CALL = "structured output belongs to the call: json_schema=, regex=, choice= or grammar="
_BEAMS = "there is no beam search"
_LORA = "there are no adapters: merge them into the weights first"
_REPLICAS = "start one daemon for each replica, behind a router (docs/http.md)"
_SAMPLER = "there is no such sampler; temperature, top_k, top_p and min_p are"
_PARSED = "thinking and tool calls of Qwen3 are always told apart; leave it out"
_ALWAYS = "it is always so; leave it out"
_ONE = "there is one, which fits the device; leave it out"

ABSENT: dict[str, str] = {
    # settings
    **dict.fromkeys(("data_parallel_size", "dp_size", "dp"), _REPLICAS),
    **dict.fromkeys(
        ("pipeline_parallel_size", "pp_size", "pp"), "there are no pipeline stages; --tp splits every layer"
    ),
    **dict.fromkeys(("enable_auto_tool_choice", "tool_call_parser", "reasoning_parser", "jinja"), _PARSED),
    **dict.fromkeys(("enable_metrics", "metrics"), "GET /metrics is always there; leave it out"),
    **dict.fromkeys(("enable_chunked_prefill", "enable_mixed_chunk", "cont_batching", "cache_prompt"), _ALWAYS),
    **dict.fromkeys(("attention_backend", "sampling_backend", "flash_attn"), _ONE),
    **dict.fromkeys(("grammar_backend", "guided_decoding_backend", "structured_outputs_config"), _ONE),
    **dict.fromkeys(("enable_lora", "lora_paths", "lora_modules", "lora", "lora_path", "lora_request"), _LORA),
    **dict.fromkeys(("download_dir", "hf_token"), "the hub's own variables hold: HF_HOME, HF_TOKEN"),
    **dict.fromkeys(("swap_space", "cpu_offload_gb"), "nothing is kept outside the device's memory"),
    **dict.fromkeys(("chat_template", "chat_template_file"), "the model folder's chat_template.jinja holds"),
    **dict.fromkeys(
        (
            "is_embedding",
            "embedding",
            "embeddings",
            "reranking",
            "rerank",
            "task",
            "runner",
            "convert",
            "pooler_config",
        ),
        "every model embeds, scores and generates, all at once; leave it out",
    ),
    "trust_remote_code": "code from a model folder is never run; leave it out",
    "generation_config": "the model folder's generation_config.json holds",
    "distributed_executor_backend": "ranks are always processes; leave it out",
    "disable_log_stats": "--log-level warning silences the line about tokens a second",
    "keep_alive": "the model stays loaded until the engine ends",
    "root_path": "let the proxy in front cut its path off",
    # sampling parameters and keywords of calls
    "chat_template_kwargs": "it is template_kwargs= here, and enable_thinking= alone",
    "prompt_token_ids": "it is input_ids= here",
    **dict.fromkeys(("json_schema", "regex", "choice", "grammar", "ebnf", "structural_tag"), _CALL),
    **dict.fromkeys(("response_format", "structured_outputs", "guided_decoding", "guided_json"), _CALL),
    **dict.fromkeys(("best_of", "use_beam_search", "num_beams", "length_penalty", "early_stopping"), _BEAMS),
    **dict.fromkeys(("typical_p", "tfs_z", "mirostat", "dry_multiplier", "xtc_probability"), _SAMPLER),
    **dict.fromkeys(("bad_words", "bad_words_ids"), "logit_bias={id: -1000} keeps a token out"),
    "allowed_token_ids": "choice= or regex= of the call say what may come",
    "logits_processors": "code of a request is never run; logit_bias and grammar= are there",
    "stop_regex": "stop takes texts; regex= of the call says what may come",
    "no_repeat_ngram_size": "frequency_penalty and repetition_penalty are there",
    "repeat_last_n": "repetition_penalty looks at prompt and output, all of both",
    "stream": "streams have calls of their own: stream, stream_chat",
    "thinking_token_budget": "it belongs to the chat: max_thinking_tokens=",
    "truncate_prompt_tokens": "what does not fit is refused, never cut",
    "pad_token_id": "nothing is padded; leave it out",
}
