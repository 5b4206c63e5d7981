"""The engine's settings: one frozen `ServerArgs`, the same for `launch.py`'s flags, a config file and `LLM(...)`.

flags.py has the table of them, `cli.py` turns it into a command line. A `ServerArgs` that exists is valid by itself;
what needs the model (degrees, context length) is checked where the model is known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.settings.address import check_address, is_loopback
from vibe_sgl_lite.runtime.settings.flags import Flags
from vibe_sgl_lite.runtime.settings.schema import our_names, settle, shown, table

# What travels in headers and names: the form of each, and what is said of another.
HTTP_TEXTS = {
    "host": (r"[!-~]+", "must be an address or a host's name"),
    "api_key": (r"[!-~]+", "must be ASCII without blanks: it travels in a header"),
    "cors_origin": (
        r"https?://[^\s/?#@*]+",
        "must be one origin, scheme and host alone, like https://chat.example.org",
    ),
    "metrics_prefix": (r"[a-zA-Z_:][a-zA-Z0-9_:]*", "must be letters, digits, _ and :, as Prometheus has names"),
}


class ServerArgs(Flags, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """All settings of one engine, checked when made: ConfigError names flag, value and what is allowed."""

    def __post_init__(self) -> None:
        settle(self, lambda name, unfit: _bad(name, unfit.value, unfit.problem))
        for name, field in FLAGS.items():
            value = getattr(self, name)
            if field.kinds == (str,) and value is not None and (value == "" or "\0" in value):
                raise _bad(name, value, "must not be empty or hold a zero byte")
        _check_address(self)
        _check_nodes(self)
        _check_http(self)
        if self.deterministic and (self.quantization == "int4" or self.tp > (1 if self.device == "cuda" else 2)):
            raise ConfigError(
                "--deterministic is for at most --tp 2, on a GPU --tp 1, and not for --quantization int4",
                field="deterministic",
            )
        if self.speculative_algorithm == ("draft" if self.draft_model_path is None else "ngram"):
            raise ConfigError(
                f"--speculative-algorithm {self.speculative_algorithm} and --draft-model-path do not fit: draft needs "
                "the model, and ngram has none",
                field="draft_model_path",
            )
        for name in ("cache_dir", "hicache_size"):
            if getattr(self, name) and self.disable_radix_cache:
                raise _bad(name, getattr(self, name), "keeps the prefix cache, which --disable-radix-cache turns off")
            if getattr(self, name) and self.nnodes > 1:
                raise _bad(name, getattr(self, name), "is for one machine: leave it out, or --nnodes")
        if self.quantization == "int8" and self.device == "cuda":
            raise _bad(
                "quantization", self.quantization, "runs on CPU only: use int4 or fp8, or --device cpu, or leave it out"
            )
        if self.quantization == "fp8" and self.device == "cpu":
            raise _bad("quantization", self.quantization, "runs on a GPU only: use int8 or int4, or leave it out")

    @property
    def draft_tokens(self) -> int:
        """Drafts of a row at most."""
        drafts = self.speculative_algorithm != "none" or self.draft_model_path is not None
        return self.speculative_num_draft_tokens if drafts else 0

    @property
    def local_ranks(self) -> range:
        """The ranks of this node: an equal, contiguous part of all `tp` of them."""
        count = self.tp // self.nnodes
        return range(self.node_rank * count, (self.node_rank + 1) * count)


FLAGS = table(ServerArgs)


def make_args(values: Mapping[str, Any]) -> ServerArgs:
    """`ServerArgs` from names with dashes or underscores, and from other engines' names for the same; None is left out.

    Raises ConfigError for an unknown name, with the nearest known one, and for a bad value.
    """
    named = our_names(values, ServerArgs, "setting", ConfigError)
    return ServerArgs(**{name: value for name, value in named.items() if value is not None})


def flag_name(field: str) -> str:
    """The flag of a field: `page_size` is `--page-size`."""
    return "--" + field.replace("_", "-")


def _check_http(args: ServerArgs) -> None:
    """Beyond loopback only for those who are let in, or on purpose; ConfigError."""
    if not (args.no_http or is_loopback(args.host) or args.api_key or args.insecure):
        raise _bad(
            "host", args.host, "is not a loopback address: give --api-key KEY, or --insecure to let anybody use it"
        )
    for name, (pattern, words) in HTTP_TEXTS.items():
        text = getattr(args, name)
        if text is not None and not re.fullmatch(pattern, text):
            raise _bad(name, shown(text), words)
    if args.ssl_keyfile is not None and args.ssl_certfile is None:
        raise _bad("ssl_keyfile", args.ssl_keyfile, "goes with --ssl-certfile, which is not given")


def _check_address(args: ServerArgs) -> None:
    """Beyond loopback only with keys, and keys only for TCP; ConfigError."""
    keys = args.server_key is not None and args.client_keys is not None
    if not keys and (args.server_key is not None or args.client_keys is not None):
        raise _bad("client_keys", args.client_keys, "and --server-key go together: give both, or none")
    if args.address is not None:
        check_address(args.address, encrypted=keys)
    if keys and not (args.address or "").startswith("tcp://"):
        raise _bad("client_keys", args.client_keys, "is for an --address of tcp://HOST:PORT: give one, or leave it out")


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


def _bad(name: str, value: object, what: str) -> ConfigError:
    return ConfigError(f"{flag_name(name)} {value} {what}", field=name)
