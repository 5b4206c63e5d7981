"""Qwen3's tokenizer, as ours and as transformers'."""

from typing import Any

import pytest

from tests.runtime.text.harness import QWEN3
from vibe_sgl_lite.runtime.text.chat_tokenizer import ChatTokenizer


@pytest.fixture(scope="module")
def ours() -> ChatTokenizer:
    return ChatTokenizer.from_folder(QWEN3)


@pytest.fixture(scope="module")
def theirs() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(QWEN3)
