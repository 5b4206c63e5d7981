"""What people type in their first hour, on the embedded model."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vibe_sgl_lite
from tests.integration.daemon import Daemon, wait_until
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
        out = llm.chat([{"role": "user", "content": "What is 17 + 25?"}], temperature=0)
        assert (out.finish_reason, out.text, out.hint) == ("stop", "42", None), "whole, with its thinking block"
        assert out.sampling is not None
        assert out.usage is not None
        assert out.sampling.max_new_tokens == 512 - out.usage.prompt_tokens
        out = llm.chat([{"role": "user", "content": "What is 17 + 25?"}], temperature=0, max_tokens=5)
        assert (out.finish_reason, out.text) == ("length", "")
        assert "only the thinking block came" in repr(out)
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
        ({"num_threads": 4000}, "^num_threads 4000 is far more than"),
        ({"tp": 3}, "^tp 3 does not fit this model"),
        ({"context_length": 2**20}, "^context_length 1048576 is above"),
    ],
)
def test_settings_are_refused_in_pythons_words(settings: dict[str, Any], says: str) -> None:
    with pytest.raises((ConfigError, vibe_sgl_lite.ModelConfigError), match=says) as caught:
        LLM(**settings)
    assert "--" not in str(caught.value)
    assert caught.value.__suppress_context__, "one traceback, not one of each library on the way"


@pytest.mark.parametrize("file", ["tokenizer.json", "model.safetensors", "config.json"])
def test_a_folder_that_lacks_a_file_is_refused_in_pythons_words(tmp_path: Path, file: str) -> None:
    """Whether before the processes start or by one of them."""
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    (model / file).unlink()
    with pytest.raises((vibe_sgl_lite.UserError, vibe_sgl_lite.StartupError)) as caught:
        LLM(model, log_level="error")
    assert str(model) in str(caught.value)
    assert "--" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_id_without_a_network_is_one_traceback_with_one_line(tmp_path: Path) -> None:
    program = "from vibe_sgl_lite import LLM; LLM('no-one/no-such-model')"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=120)
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.splitlines()[-1].startswith(
        "vibe_sgl_lite.runtime.errors.ConfigError: model_path no-one/no-such-model: there is no such folder here, and "
        "the hub gave no model (HF_HUB_OFFLINE is set)"
    )
    assert len(done.stderr.splitlines()) < 20


@pytest.mark.slow
def test_the_log_says_what_the_engine_does(tmp_path: Path) -> None:
    """How much fits, and a line while it works."""
    with Daemon("--log-level", "info", "--max-total-tokens", "4096") as daemon:
        daemon.wait_ready()
        assert "the KV cache holds 4096 tokens, the context has 32768" in daemon.log()
        with daemon.client() as client:

            def busy() -> bool:
                client.generate(["Once"] * 8, max_new_tokens=200, ignore_eos=True)
                return "tokens/s generated" in daemon.log()

            wait_until(busy, 120, "a status line")
        line = next(line for line in daemon.log().splitlines() if "tokens/s generated" in line)
        assert re.search(r"scheduler INFO [\d.]+ tokens/s generated, .* running, .* % of the KV cache in use", line)
