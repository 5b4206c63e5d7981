"""Files in Chrome's trace format, for ui.perfetto.dev or chrome://tracing. Each process writes one of its own.

Times are of `time.monotonic`, which all processes of one machine share, so the files of one run can be laid together:

    python -m vibe_sgl_lite.runtime.chrome_trace FOLDER       writes FOLDER/all.trace.json

Format: the JSON array form of the "Trace Event Format"; its closing bracket is optional, so a file of a process that
was killed opens too.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.observer_file import ObserverFile

SUFFIX = ".trace.json"
MERGED = "all" + SUFFIX
SCHEDULER, WORKERS, REQUESTS, DETOKENIZER, TOKENIZER_MANAGER = range(1, 6)
TRACKS = {
    SCHEDULER: "scheduler", WORKERS: "model_worker", REQUESTS: "requests", DETOKENIZER: "detokenizer",
    TOKENIZER_MANAGER: "tokenizer_manager",
}  # fmt: skip

_encoder = msgspec.json.Encoder()


class ChromeTrace:
    """Writes `folder`/`name`.trace.json. Any thread may write; a full disk ends the file and nothing else.

    Raises ConfigError when the file cannot be made.
    """

    def __init__(self, folder: str | Path, name: str, tracks: Sequence[int]) -> None:
        try:
            os.makedirs(folder, exist_ok=True)
            self._file = ObserverFile(Path(folder) / (name + SUFFIX))
        except OSError as error:
            raise ConfigError(f"profile={str(folder)!r}: {error.strerror}; name a folder to write to") from error
        self._file.write(b"[\n")
        for track in tracks:
            self.event("M", track, name="process_name", args={"name": TRACKS[track]})

    def event(self, kind: str, track: int, now: float = 0.0, thread: int = 1, **fields: Any) -> None:
        """kind: the format's `ph`. now: seconds. thread: a line of its own in the track."""
        event = {"ph": kind, "pid": track, "tid": thread, "ts": round(now * 1e6, 1), **fields}
        self._file.write(_encoder.encode(event) + b",\n")

    def span(self, track: int, name: str, start: float, seconds: float, args: dict[str, Any]) -> None:
        """Something that the calling thread did from `start` on, for so many seconds."""
        thread = 1 if threading.current_thread() is threading.main_thread() else threading.get_native_id()
        self.event("X", track, start, thread, name=name, dur=round(max(0.0, seconds) * 1e6, 1), args=args)

    def close(self) -> None:
        self._file.close(b"\n]\n", instead_of=2)


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of one file; what a killed process has left half written at its end is dropped."""
    text = path.read_bytes().rstrip()
    if not text.endswith(b"]"):
        text = text[: text.rfind(b"\n")].rstrip().rstrip(b",") + b"]"
    events: list[dict[str, Any]] = msgspec.json.decode(text)
    return events


def merge(folder: Path) -> Path:
    """Write all files of `folder` into one; returns its path. Raises ConfigError when there are none."""
    paths = sorted(path for path in folder.glob("*" + SUFFIX) if path.name != MERGED)
    if not paths:
        raise ConfigError(f"{folder}: no *{SUFFIX} in it; name a folder that --profile has written to")
    (folder / MERGED).write_bytes(_encoder.encode([event for path in paths for event in read_events(path)]))
    return folder / MERGED


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m vibe_sgl_lite.runtime.chrome_trace FOLDER\n")
        return 2
    try:
        sys.stdout.write(f"{merge(Path(arguments[0]))}\n")
    except (ConfigError, OSError, msgspec.DecodeError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
