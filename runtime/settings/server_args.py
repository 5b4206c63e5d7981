"""The engine's settings: one frozen `ServerArgs`, the same for `launch.py`'s flags, a config file and `LLM(...)`.

Flags are the fields' names with dashes. `FLAGS` holds what people read and what values are allowed, beside the fields
that it describes; `runtime/settings/cli.py` turns it into a command line. A `ServerArgs` that exists is valid by
itself; what needs the model (degrees, context length) is checked where the model is known.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

import msgspec

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.settings.address import check_address, check_name


class Flag(msgspec.Struct, frozen=True, kw_only=True):
    """What one setting means and may be. `unset`: what the default None stands for, in words."""

    help: str
    unit: str = ""
    unset: str = ""
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    above_low: bool = False  # `low` itself is not allowed


class ServerArgs(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """All settings of one engine, checked when made: ConfigError names flag, value and what is allowed."""

    model_path: str = "embedded"
    tokenizer_path: str | None = None
    load_format: str = "auto"
    dtype: str = "auto"
    quantization: str = "none"
    kv_cache_dtype: str = "auto"
    device: str = "auto"
    tp: int = 1
    ep: int = 1
    moe_dispatch: str = "all-reduce"
    nnodes: int = 1
    node_rank: int = 0
    dist_init_addr: str | None = None
    name: str = "default"
    address: str | None = None
    context_length: int | None = None
    page_size: int = 16
    max_total_tokens: int | None = None
    mem_fraction_static: float = 0.85
    max_running_requests: int = 256
    max_queued_requests: int = 2048
    chunked_prefill_size: int | None = None
    max_step_stretch: float = 3.0
    schedule_policy: str = "fcfs"
    disable_radix_cache: bool = False
    disable_overlap: bool = False
    num_threads: int | None = None
    seed: int = 0
    step_timeout: float = 30.0
    restart: str = "never"
    max_restarts: int = 3
    log_level: str = "info"
    trace: str | None = None
    profile: str | None = None
    debug_rank_digest: bool = False

    def __post_init__(self) -> None:
        for field in msgspec.structs.fields(type(self)):
            _check(field.name, field.type, getattr(self, field.name))
        _check_nodes(self)
        if self.quantization != "none" and self.device == "cuda":
            raise _bad("quantization", self.quantization, "runs on CPU only: give --device cpu, or leave it out")

    @property
    def local_ranks(self) -> range:
        """The ranks of this node: an equal, contiguous part of all `tp` of them."""
        count = self.tp // self.nnodes
        return range(self.node_rank * count, (self.node_rank + 1) * count)


FLAGS: Mapping[str, Flag] = {
    "model_path": Flag(
        help="folder with config.json, tokenizer.json and *.safetensors; or a model id of the Hugging Face hub, "
        "downloaded on first use; or 'embedded', the small model inside this package",
    ),
    "tokenizer_path": Flag(
        help="folder or hub id of the tokenizer, where it is not the model's own", unset="the model's folder"
    ),
    "load_format": Flag(
        help="auto reads the checkpoint; dummy makes seeded random weights from config.json alone",
        choices=("auto", "dummy"),
    ),
    "dtype": Flag(
        help="number format of weights and activations; auto is the checkpoint's own",
        choices=("auto", "float32", "bfloat16", "float16"),
    ),
    "quantization": Flag(
        help="on a CPU, keep matrices in fewer bits, made while loading: int8 (with activations in 8 bits too) is "
        "faster at any batch size, int4 (weights only) the fastest for one request",
        choices=("none", "int8", "int4"),
    ),
    "kv_cache_dtype": Flag(
        help="number format of the KV cache; auto is the model's. int8, on a CPU, with a scale a token and head: the "
        "same memory holds almost twice the tokens of bfloat16, and the answers are almost the same",
        choices=("auto", "int8"),
    ),
    "device": Flag(
        help="where the model runs; auto is cuda where a GPU and a torch built for it are found, else cpu",
        choices=("auto", "cpu", "cuda"),
    ),
    "tp": Flag(help="tensor parallelism: over how many ranks each layer is split", unit="ranks", low=1, high=1024),
    "ep": Flag(
        help="expert parallelism: over how many of the tp ranks the experts are split; each expert is split over the "
        "tp / ep ranks that share it",
        unit="ranks",
        low=1,
        high=1024,
    ),
    "moe_dispatch": Flag(
        help="how tokens meet their experts: all-reduce adds up what each rank's experts make of all tokens, "
        "all-to-all sends each token only to the ranks whose experts it chose",
        choices=("all-reduce", "all-to-all"),
    ),
    "nnodes": Flag(
        help="machines that share the ranks, tp / nnodes each; the same command runs on all of them, with its own "
        "--node-rank. The network between them must be isolated: nothing on it is authenticated",
        unit="nodes",
        low=1,
        high=1024,
    ),
    "node_rank": Flag(
        help="which of the nodes this is: 0 serves clients, the others only host ranks", low=0, high=1023
    ),
    "dist_init_addr": Flag(
        help="HOST:PORT of node 0 where the ranks of all nodes meet, the same on every node",
        unset="none is needed on one machine",
    ),
    "name": Flag(help="name of this daemon; clients find it under the same name, and several can run side by side"),
    "address": Flag(
        help="where clients connect: ipc://PATH or tcp://127.0.0.1:PORT (port 0 picks a free one; the ready line "
        "tells it)",
        unset="an ipc socket in the private run directory, under --name",
    ),
    "context_length": Flag(
        help="longest prompt plus output of one request", unit="tokens", unset="the model's own", low=2, high=2**31 - 1
    ),
    "page_size": Flag(
        help="KV cache page, the unit of allocation and of prefix sharing", unit="tokens", low=1, high=4096
    ),
    "max_total_tokens": Flag(
        help="size of the KV cache; wins over --mem-fraction-static",
        unit="tokens",
        unset="as --mem-fraction-static allows, on CPU at most 4 GiB",
        low=1,
        high=2**40,
    ),
    "mem_fraction_static": Flag(
        help="part of the memory that weights and KV cache together may take",
        unit="of the free memory",
        low=0,
        high=1,
        above_low=True,
    ),
    "max_running_requests": Flag(
        help="requests that generate at the same time; more wait", unit="requests", low=1, high=65_536
    ),
    "max_queued_requests": Flag(
        help="requests that may wait; one more is refused as overloaded", unit="requests", low=1, high=10_000_000
    ),
    "chunked_prefill_size": Flag(
        help="prompt tokens that one step computes at most; longer prompts are cut into chunks",
        unit="tokens",
        unset="512 on CPU, 2048 on GPU",
        low=1,
        high=2**20,
    ),
    "max_step_stretch": Flag(
        help="while requests generate, a step that also computes prompts takes at most so many times as long as one "
        "that does not; more gets prompts done sooner, and streams wait longer between tokens",
        unit="decode steps",
        low=1,
        high=1_000_000,
        above_low=True,
    ),
    "schedule_policy": Flag(
        help="who runs first: fcfs (arrival), lpm (longest cached prefix), dfs-weight (largest shared prefix), "
        "priority (highest priority)",
        choices=("fcfs", "lpm", "dfs-weight", "priority"),
    ),
    "disable_radix_cache": Flag(help="do not share the KV cache between requests with a common prefix"),
    "disable_overlap": Flag(help="plan a step only when the result of the one before it is back"),
    "num_threads": Flag(
        help="threads of each rank", unit="threads", unset="cores / ranks on this machine", low=1, high=4096
    ),
    "seed": Flag(help="seed of --load-format dummy's weights", low=0, high=2**63 - 1),
    "step_timeout": Flag(
        help="a rank that does not answer a step for this long is taken for hung, dumped and killed",
        unit="seconds",
        low=0,
        high=86_400,
        above_low=True,
    ),
    "restart": Flag(
        help="when a process of the engine dies: on-failure starts it again, and requests go on from the tokens they "
        "have; never ends the engine with one clear error for every request",
        choices=("on-failure", "never"),
    ),
    "max_restarts": Flag(
        help="restarts of one process within a minute; when it dies once more, the engine ends", low=0, high=1_000_000
    ),
    "log_level": Flag(help="how much is logged to stderr", choices=("debug", "info", "warning", "error")),
    "trace": Flag(
        help="file to record every input and decision of the scheduler to, for an exact replay; prompts are in it",
        unset="no trace",
    ),
    "profile": Flag(
        help="folder to write timelines of steps and requests to, a file a process, for ui.perfetto.dev",
        unset="no timeline",
    ),
    "debug_rank_digest": Flag(
        help="compare every step's batch and sampled tokens over all ranks; a difference ends the engine and names "
        "the step"
    ),
}


def make_args(values: Mapping[str, Any]) -> ServerArgs:
    """`ServerArgs` from names with dashes or underscores.

    Raises ConfigError for an unknown name, with the nearest known one, and for a bad value.
    """
    known: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in FLAGS:
            near = difflib.get_close_matches(name, FLAGS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(FLAGS)}"
            raise ConfigError(f"{key} is not a setting; {hint}", field=key)
        if name in known:
            raise ConfigError(f"{key} is set twice, with a dash and with an underscore; keep one", field=key)
        known[name] = value
    return ServerArgs(**known)


def flag_name(field: str) -> str:
    """The flag of a field: `page_size` is `--page-size`."""
    return "--" + field.replace("_", "-")


def _check(name: str, kind: Any, value: Any) -> None:
    try:
        msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError:
        raise _bad(name, value, f"must be {_kind_words(kind)}") from None
    if value is None:
        return
    flag = FLAGS[name]
    if flag.choices and value not in flag.choices:
        raise _bad(name, value, f"must be one of {', '.join(flag.choices)}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        _check_range(name, flag, value)
    if value == "" or (isinstance(value, str) and "\0" in value):
        raise _bad(name, value, "must not be empty or hold a zero byte")
    if name == "name":
        check_name(value)
    elif name == "address":
        check_address(value)
    elif name == "dist_init_addr":
        split_host_port(value)


def split_host_port(address: str) -> tuple[str, int]:
    """("HOST", PORT) of --dist-init-addr; ConfigError when it is not HOST:PORT."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise _bad("dist_init_addr", address, "must be HOST:PORT, with node 0's address, like 10.0.0.1:29500")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _check_nodes(args: ServerArgs) -> None:
    """What the settings of several nodes must agree on; ConfigError."""
    if args.tp % args.nnodes:
        possible = ", ".join(str(count) for count in range(1, args.tp + 1) if args.tp % count == 0)
        raise _bad(
            "nnodes", args.nnodes, f"does not divide --tp {args.tp}, the ranks of all nodes; possible: {possible}"
        )
    if args.node_rank >= args.nnodes:
        raise _bad("node_rank", args.node_rank, f"must be below --nnodes {args.nnodes}: nodes count from 0")
    if args.nnodes > 1 and args.dist_init_addr is None:
        raise _bad("nnodes", args.nnodes, "needs --dist-init-addr HOST:PORT, where the nodes meet: node 0's address")
    if args.nnodes == 1 and args.dist_init_addr is not None:
        raise _bad("dist_init_addr", args.dist_init_addr, "is for several nodes: give --nnodes too, or leave it out")


def _check_range(name: str, flag: Flag, value: float) -> None:
    low, high = flag.low, flag.high
    too_low = low is not None and (value <= low if flag.above_low else value < low)
    if not math.isfinite(value) or too_low or (high is not None and value > high):
        bound = f"above {low:.12g}" if flag.above_low else f"at least {low}"
        raise _bad(name, value, f"must be {bound} and at most {high}" + (f" ({flag.unit})" if flag.unit else ""))


def _kind_words(kind: Any) -> str:
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
    return next(text for part, text in words.items() if part in str(kind))


def _bad(name: str, value: object, what: str) -> ConfigError:
    return ConfigError(f"{flag_name(name)} {value} {what}", field=name)
