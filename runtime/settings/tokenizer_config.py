"""tokenizer_config.json: which of its keys count, and the end token that it names.

transformers reads the file for the tokenizer manager (runtime/text/chat_tokenizer.py); this is what is known without
it, and before any process starts. docs/models.md has the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vibe_sgl_lite.runtime.errors import TokenizerError
from vibe_sgl_lite.runtime.settings.json_file import JsonFile

FILE = "tokenizer_config.json"
_SPECIAL = "a special token; templates may name it"
USED: Mapping[str, str] = {
    "added_tokens_decoder": "tokens beside those of tokenizer.json, by id",
    "chat_template": "where the folder has no chat_template.jinja",
    "bos_token": _SPECIAL,
    "eos_token": "an end token, beside those of config.json and generation_config.json, as in vLLM and SGLang",
    "pad_token": _SPECIAL,
    "unk_token": _SPECIAL,
    "additional_special_tokens": "further special tokens",
    "extra_special_tokens": "further special tokens",
    "add_bos_token": "only where the folder has no tokenizer.json",
    "add_eos_token": "only where the folder has no tokenizer.json",
    "add_prefix_space": "only where the folder has no tokenizer.json",
    "split_special_tokens": "whether special tokens in a prompt are text",
}
# Known, and nothing depends on them: the context is config.json's, prompts are neither padded nor cut, and decoding
# is tokenizer.json's.
UNUSED = frozenset({
    "backend", "clean_up_tokenization_spaces", "errors", "is_local", "legacy", "max_length",
    "model_input_names", "model_max_length", "name_or_path", "pad_to_multiple_of", "pad_token_type_id", "padding_side",
    "processor_class", "special_tokens_map_file", "stride", "tokenizer_class", "tokenizer_file", "truncation_side",
    "truncation_strategy", "unsloth_version", "use_fast",
})  # fmt: skip


def end_token_id(folder: Path) -> int | None:
    """The id of the `eos_token` that the tokenizer in `folder` names; None where it names none that has an id.

    Warns of keys that are not known. Raises TokenizerError for a file that is no JSON, or that asks for code.
    """
    config = JsonFile.read_if_there(folder / FILE, TokenizerError)
    if config.get("auto_map") is not None:
        raise config.error(
            "auto_map", config.get("auto_map"), "asks for code from the model folder, which is never run; remove it"
        )
    config.warn_of_others({*USED, *UNUSED, "auto_map", *(key for key in config.values if key.endswith("_token"))})
    token = _content(config.get("eos_token"))
    if token is None:
        return None
    added = config.get("added_tokens_decoder")
    ids = {_content(entry): number for number, entry in added.items()} if isinstance(added, dict) else {}
    if token not in ids:
        listed = JsonFile.read_if_there(folder / "tokenizer.json", TokenizerError).get("added_tokens")
        ids = {_content(entry): entry.get("id") for entry in _dicts(listed)}
    number = str(ids.get(token))
    return int(number) if number.isascii() and number.isdigit() and len(number) < 10 else None


def _content(token: Any) -> str | None:
    """Of a token that is given by its text, or as an object that says more of it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _dicts(entries: Any) -> list[dict[str, Any]]:
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
