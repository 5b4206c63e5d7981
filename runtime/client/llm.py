"""The offline engine: a pipeline of one's own and the sync client to it, in one object."""

from __future__ import annotations

import os
import re
import secrets
import time
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vibe_sgl_lite.runtime.client.client import Client
from vibe_sgl_lite.runtime.client.connection import Connection
from vibe_sgl_lite.runtime.errors import ConfigError, RequestError, StartupError, UserError
from vibe_sgl_lite.runtime.launcher.pipeline import Pipeline
from vibe_sgl_lite.runtime.settings.schema import is_list, shown
from vibe_sgl_lite.runtime.settings.server_args import make_args

if TYPE_CHECKING:
    from vibe_sgl_lite.runtime.text.chat_tokenizer import ChatTokenizer

CAUSE_WAIT_S = 0.5  # a broken connection is seen at once, the watch knows a little later which process died


class LLM(Client):
    """Spawns an engine, the same processes as `launch.py`, and is its client; `close` stops it. A context manager.

    model_path and settings: the flags of `launch.py`, with underscores. The name is random unless given. Works from
    any thread, without a main guard, from stdin and in notebooks; the engine dies with this process. resume: as in
    `Client`. Raises ConfigError, ModelConfigError and the like for what the user can fix, StartupError when a process
    did not come up. When a process dies later for good, calls raise EngineDeadError with the cause.
    """

    def __init__(
        self, model_path: str | os.PathLike[str] | None = None, *, resume: bool = True, **settings: Any
    ) -> None:
        if model_path is not None:
            settings["model_path"] = model_path
        try:
            args = make_args({"name": f"llm-{secrets.token_hex(4)}", **settings, "no_http": True})
            if args.node_rank > 0:
                raise ConfigError(
                    f"--node-rank {args.node_rank} only hosts ranks, which needs launch.py; LLM runs on node 0",
                    field="node_rank",
                )
            self._start(Pipeline(args), resume)
        except UserError as error:
            raise type(error)(_in_python(str(error)), field=error.field) from None
        except StartupError as error:
            raise StartupError(_in_python(str(error)), user=error.user) from None

    def _start(self, pipeline: Pipeline, resume: bool) -> None:
        self._pipeline = pipeline
        weakref.finalize(self, pipeline.request_stop, 0.0).atexit = False  # at exit the pipeline stops itself

        def cause() -> str | None:
            deadline = time.monotonic() + CAUSE_WAIT_S
            while pipeline.failure is None and time.monotonic() < deadline:
                time.sleep(0.01)
            return pipeline.failure

        try:
            pipeline.start()
            lives = lambda: pipeline.failure is None and not pipeline.wait(0.0)  # noqa: E731
            self._attach(Connection(pipeline.address, resume=resume, owner=True, lives=lives, cause=cause))
        except BaseException:
            pipeline.stop(0.0)
            raise

    @property
    def facts(self) -> dict[str, int | float | str]:
        """What the ready line of `launch.py` tells: address, model, device, dtype, tp, kv_pages, startup, ..."""
        return self._pipeline.facts

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, as the engine tokenizes it. The first call loads the tokenizer."""
        if not isinstance(text, str):
            raise RequestError(f"text={shown(text)} must be a text", field="text")
        return self._tokenizer.encode(text)

    def count_tokens(self, prompt: str | Sequence[Mapping[str, Any]], **template_kwargs: Any) -> int:
        """Tokens of a text, or of a chat through the model's template (`enable_thinking`, `tools`, ...)."""
        if isinstance(prompt, str):
            return len(self.encode(prompt))
        if not is_list(prompt) or not all(isinstance(message, Mapping) for message in prompt):
            raise RequestError("prompt must be a text, or a list of messages", field="prompt")
        known = self._tokenizer.template_variables() | {"allow_special_tokens"}
        for name in template_kwargs:
            if name not in known:
                raise RequestError(f"{name} is not used by this model's chat template; leave it out", field=name)
        return len(self._tokenizer.encode_chat(self._tokenizer.apply_chat_template(prompt, **template_kwargs)))

    @cached_property
    def _tokenizer(self) -> ChatTokenizer:
        from vibe_sgl_lite.runtime.text.chat_tokenizer import ChatTokenizer  # which takes seconds to import

        return ChatTokenizer.from_folder(self._pipeline.tokenizer_folder)

    def close(self) -> None:
        """Abort what runs and stop the engine's processes; returns when they are gone. Safe to call again."""
        super().close()
        self._pipeline.stop(0.0)


def _in_python(message: str) -> str:
    """Flags as the keywords that they are here."""
    return re.sub(r"--([a-z][a-z0-9-]*)", lambda match: match[1].replace("-", "_"), message)
