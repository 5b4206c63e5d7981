"""The tables of fields in docs/, made from what the code checks: `python docs/tables.py` writes them anew.

A table stands between `<!-- fields: NAME -->` and `<!-- end -->`; NAME is a group of server settings,
`sampling`, a file's name, `not used of` one, `class` and a public class (`own of`: without what it
inherits), `errors`, or `absent` (names of other engines).
tests/test_docs.py checks that the pages are up to date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from docs.reference import class_reference, error_reference
from vibe_sgl_lite.runtime.settings import model_config, quantized_form, tokenizer_config
from vibe_sgl_lite.runtime.settings.elsewhere import ABSENT
from vibe_sgl_lite.runtime.settings.memory_parts import rank_memory
from vibe_sgl_lite.runtime.settings.model_config import GenerationDefaults, ModelConfig, Yarn
from vibe_sgl_lite.runtime.settings.sampling_params import FIELDS
from vibe_sgl_lite.runtime.settings.schema import Field, table
from vibe_sgl_lite.runtime.settings.server_args import FLAGS, flag_name

MODEL_TABLES = {"config.json": ModelConfig, "yarn": Yarn, "generation_config.json": GenerationDefaults}
# Keys that change nothing, by what the list is called.
NOT_USED = {
    "not used of config.json": model_config.UNUSED,
    "not used of quantization_config": quantized_form.UNUSED,
    "not used of generation_config.json": model_config.GENERATION_UNUSED,
    "not used of tokenizer_config.json": tokenizer_config.UNUSED,
}
# Qwen3's shapes, from their config.json: (hidden, MLP or expert width, layers, heads, KV heads, tied, experts).
QWEN3 = {
    "Qwen3-0.6B": (1024, 3072, 28, 16, 8, True, 0),
    "Qwen3-1.7B": (2048, 6144, 28, 16, 8, True, 0),
    "Qwen3-4B": (2560, 9728, 36, 32, 8, True, 0),
    "Qwen3-8B": (4096, 12288, 36, 32, 8, False, 0),
    "Qwen3-14B": (5120, 17408, 40, 40, 8, False, 0),
    "Qwen3-32B": (5120, 25600, 64, 64, 8, False, 0),
    "Qwen3-30B-A3B": (2048, 768, 48, 32, 4, False, 128),
    "Qwen3-235B-A22B": (4096, 1536, 94, 64, 4, False, 128),
}
PAGES = tuple(Path(__file__).resolve().parent.glob("*.md"))
PLACE = re.compile(r"(<!-- fields: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str) -> str:
    """A page's text with its tables as they should be."""
    return PLACE.sub(lambda match: match[1] + "\n".join(_table(match[2])) + "\n" + match[3], page)


def _table(name: str) -> Iterator[str]:
    if name == "errors":
        yield from error_reference()
        return
    if name.startswith(("class ", "own of ")):
        yield from class_reference(name.split()[-1], inherited=name.startswith("class "))
        return
    if name in MODEL_TABLES:
        yield "| key | allowed | meaning |\n|---|---|---|"
        for field in table(MODEL_TABLES[name]).values():
            allowed = ", ".join(field.spec.choices) or _allowed(field)
            otherwise = "" if field.default is msgspec.NODEFAULT or field.default is None else f"`{field.default}`"
            otherwise = field.spec.unset or otherwise
            text = _meaning(field) + (f" Left out: {otherwise}." if otherwise else "")
            yield f"| `{field.name}` | {allowed} | {text} |"
        return
    if name == "memory":
        yield "| model | bfloat16 | `int8` | `int4` | KV cache, 1,000 tokens | with `--kv-cache-dtype int8` |"
        yield "|---|---|---|---|---|---|"
        yield from (_memory(model) for model in QWEN3)
        return
    if name in NOT_USED:
        yield f"Known and not used: {', '.join(f'`{key}`' for key in sorted(NOT_USED[name]))}."
        return
    if name == tokenizer_config.FILE:
        yield "| key | meaning |\n|---|---|"
        for key, meaning in tokenizer_config.USED.items():
            yield f"| `{key}` | {meaning[0].upper()}{meaning[1:]}. |"
        return
    if name == "absent":
        names: dict[str, list[str]] = {}
        for theirs, said in ABSENT.items():
            names.setdefault(said, []).append(f"`{theirs}`")
        yield "| theirs | here |\n|---|---|"
        yield from (f"| {', '.join(theirs)} | {said} |" for said, theirs in names.items())
        return
    if name == "sampling":
        yield "| field | default | allowed | meaning |\n|---|---|---|---|"
        for field in FIELDS.values():
            yield f"| `{field.name}` | `{field.default}` | {_allowed(field)} | {_meaning(field)} |"
        return
    yield "| flag | default | meaning |\n|---|---|---|"
    fields = [field for field in FLAGS.values() if field.spec.group == name]
    assert fields, f"there is no group {name!r} of settings"
    for field in fields:
        yield f"| `{flag_name(field.name)}` | {_default(field)} | {_meaning(field)} |"


def _memory(name: str) -> str:
    hidden, width, layers, heads, kv_heads, tied, experts = QWEN3[name]
    config = ModelConfig(
        architecture=model_config.MOE if experts else model_config.DENSE, vocab_size=151_936, hidden_size=hidden,
        intermediate_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=128, max_position_embeddings=40_960, tie_word_embeddings=tied, num_experts=experts,
        num_experts_per_tok=8 if experts else 0, moe_intermediate_size=width if experts else 0,
    )  # fmt: skip
    kept = [rank_memory(config, tp=1, ep=1, dtype="bfloat16", quantization=form) for form in ("none", "int8", "int4")]
    int8_cache = rank_memory(config, tp=1, ep=1, dtype="bfloat16", int8_cache=True)
    weights = " | ".join(f"{memory.weight_bytes / 2**30:.2f}" for memory in kept)
    cache = " | ".join(f"{1000 * memory.kv_token / 2**30:.3f}" for memory in (kept[0], int8_cache))
    return f"| {name} | {weights} | {cache} |"


def _meaning(field: Field) -> str:
    spec = field.spec
    text = " ".join(filter(None, (f"{spec.help}.", spec.more)))
    text = text if text.startswith("`") else text[0].upper() + text[1:]
    if spec.aliases:
        text += f" Also called {', '.join(f'`{alias}`' for alias in spec.aliases)}."
    return text.replace("|", "\\|")


def _default(field: Field) -> str:
    default = str(field.default).lower() if isinstance(field.default, bool) else field.default
    return field.spec.unset if default is None else f"`{default}` {field.spec.unit}".strip()


def _allowed(field: Field) -> str:
    spec, kind = field.spec, field.kinds[-1]
    if kind == list[str]:
        return f"at most {spec.items}, each of 1 to {spec.chars} characters"
    if kind == list[int]:
        return f"at most {spec.items} ids"
    if kind == dict[int, float]:
        return f"at most {spec.items} ids; {field.range_words}"
    return "" if kind is bool else spec.allowed or field.range_words


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(fill(path.read_text()))
        sys.stdout.write(f"{path}\n")
