"""Renders chats into training text through chat_template.jinja, the way transformers renders it.

One compiled template in place of a tokenizer's `apply_chat_template`, because the corpus renders millions of chats.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox

TEMPLATE_FILE = Path(__file__).with_name("chat_template.jinja")

Message = dict[str, Any]
Tool = Mapping[str, Any]


def render_chat(
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] = (),
    add_generation_prompt: bool = True,
    enable_thinking: bool = True,
) -> str:
    """The chat as one text; with `add_generation_prompt` it ends where the assistant's next turn begins."""
    return _compiled().render(
        messages=list(messages),
        tools=list(tools) or None,
        add_generation_prompt=add_generation_prompt,
        enable_thinking=enable_thinking,
    )


def tools_as_system_message(tools: Sequence[Tool]) -> Message:
    """A system message that renders exactly as passing `tools` would, for callers that cannot pass tools."""
    rendered = render_chat([{"role": "user", "content": ""}], tools=tools, add_generation_prompt=False)
    body = rendered.removeprefix("<|im_start|>system\n").split("<|im_end|>", 1)[0]
    return {"role": "system", "content": body}


@cache
def _compiled() -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    # jinja2's own tojson escapes HTML and sorts keys; transformers replaces it in the same way.
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(TEMPLATE_FILE.read_text(encoding="utf-8"))
