"""The engine's settings: one frozen `ServerArgs`, the same for `launch.py`'s flags, a config file and `LLM(...)`.

Flags are the fields' names with dashes. Help texts, units and defaults live here, beside the fields they describe.
"""

from __future__ import annotations

import msgspec


class ServerArgs(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    model_path: str = "embedded"
    tokenizer_path: str | None = None
    load_format: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    tp: int = 1
    ep: int = 1
    name: str = "default"
    address: str | None = None
    context_length: int | None = None
    page_size: int = 16
    max_total_tokens: int | None = None
    mem_fraction_static: float = 0.85
    max_running_requests: int = 256
    max_queued_requests: int = 2048
    chunked_prefill_size: int | None = None
    schedule_policy: str = "fcfs"
    disable_radix_cache: bool = False
    disable_overlap: bool = False
    num_threads: int | None = None
    seed: int = 0
    step_timeout: float = 30.0
    log_level: str = "info"
