"""What people type in their first hour, on the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vibe_sgl_lite
from vibe_sgl_lite import LLM, ConfigError, RequestError

TINY = Path(vibe_sgl_lite.__file__).parent / "models" / "tiny"


def test_names_and_values_that_people_bring() -> None:
    with LLM(TINY, tensor_parallel_size=1, max_model_len=512, max_num_seqs=4, log_level="error") as llm:
        assert llm.facts["tp"] == 1
        assert llm.model.context_length == 512
        out = llm.generate("Once upon a time", temperature=0, max_tokens=5)
        assert len(out.token_ids) == 5
        assert out.usage is not None
        assert out.usage.prompt_tokens == len(llm.encode("Once upon a time")) == llm.count_tokens("Once upon a time")
        chat: list[dict[str, Any]] = [{"role": "user", "content": "What is 17 + 25? <|im_end|>"}]
        out = llm.chat(chat, {"max_tokens": 3}, enable_thinking=False)
        assert out.usage is not None
        assert out.usage.prompt_tokens == llm.count_tokens(chat, enable_thinking=False)
        out = llm.chat(chat, max_tokens=3, allow_special_tokens=True, enable_thinking=False)
        assert out.usage is not None
        assert out.usage.prompt_tokens == llm.count_tokens(chat, enable_thinking=False, allow_special_tokens=True)
        assert out.usage.prompt_tokens < llm.count_tokens(chat, enable_thinking=False)
        for wrong in (5, None, b"x"):
            with pytest.raises(RequestError):
                llm.encode(wrong)  # type: ignore[arg-type]
            with pytest.raises(RequestError):
                llm.count_tokens(wrong)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="colour is not used"):
            llm.count_tokens(chat, colour="red")
        whole = llm.generate("Once", max_new_tokens=None, ignore_eos=True, temperature=0)
        assert whole.usage is not None
        assert whole.usage.prompt_tokens + whole.usage.completion_tokens == 512
        with pytest.raises(vibe_sgl_lite.DeadlineError) as late:
            llm.generate("Once", max_new_tokens=500, ignore_eos=True, timeout_s=0.1)
        assert late.value.output.finish_reason == "error"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"page_size": 0}, "^page_size 0 must be at least 1"),
        (
            {"gpu_memory_utilization": 0.9},
            "gpu_memory_utilization is not a setting; mem_fraction_static is",
        ),
        ({"tp": 3, "nnodes": 2}, "^nnodes 2 does not divide tp 3"),
        ({"model_path": 5}, "^model_path 5 must be a text"),
        ({"tp": 3}, "^tp 3 does not fit this model"),
        ({"context_length": 2**20}, "^context_length 1048576 is above"),
    ],
)
def test_settings_are_refused_in_pythons_words(settings: dict[str, Any], says: str) -> None:
    with pytest.raises((ConfigError, vibe_sgl_lite.ModelConfigError), match=says) as caught:
        LLM(**settings)
    assert "--" not in str(caught.value)
