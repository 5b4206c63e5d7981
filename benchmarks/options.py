"""Options that benchmarks of the whole engine share: the model, and every unknown flag as an engine setting."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.offline import EMBEDDED, engine_flags


def parse_with_engine_flags(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The parser's own options, with model options added; and the settings of the engine, as keywords of `LLM`."""
    parser.add_argument("--model-path", default=str(EMBEDDED), help="model folder (the embedded model)")
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto")
    parser.add_argument("--dtype", default="bfloat16", help="float32, bfloat16 or float16 (bfloat16)")
    options, rest = parser.parse_known_args()
    options.model_path = str(Path(options.model_path).resolve())
    settings = engine_flags(parser, rest)
    settings |= {"model_path": options.model_path, "load_format": options.load_format, "dtype": options.dtype}
    return options, settings


def vocab_size_of(model_path: str) -> int:
    """From the model's config.json."""
    size: int = json.loads((Path(model_path) / "config.json").read_text())["vocab_size"]
    return size
