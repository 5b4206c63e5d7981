"""Timelines of several processes: one file each, laid together, also after a process was killed."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from vibe_sgl_lite.runtime.chrome_trace import (
    DETOKENIZER,
    MERGED,
    SCHEDULER,
    TOKENIZER_MANAGER,
    ChromeTrace,
    main,
    merge,
    read_events,
)
from vibe_sgl_lite.runtime.errors import ConfigError


def test_files_are_valid_and_are_merged(tmp_path: Path) -> None:
    first = ChromeTrace(tmp_path, "a", (DETOKENIZER,))
    first.span(DETOKENIZER, "work", 1.5, 0.25, {"n": 3})
    first.close()
    second = ChromeTrace(tmp_path, "b", (TOKENIZER_MANAGER,))
    thread = threading.Thread(target=second.span, args=(TOKENIZER_MANAGER, "elsewhere", 2.0, -1.0, {}))
    thread.start()
    thread.join()
    second.close()
    assert main([str(tmp_path)]) == 0
    assert main([str(tmp_path)]) == 0  # the merged file is not merged again
    events = json.loads((tmp_path / MERGED).read_text())
    assert [event["name"] for event in events] == ["process_name", "work", "process_name", "elsewhere"]
    work, elsewhere = events[1], events[3]
    assert (work["ts"], work["dur"], work["args"], work["tid"]) == (1.5e6, 0.25e6, {"n": 3}, 1)
    assert elsewhere["dur"] == 0
    assert elsewhere["tid"] != 1


@pytest.mark.parametrize("cut", [1, 2, 3, 10, 60])
def test_a_killed_process_leaves_a_readable_file(tmp_path: Path, cut: int) -> None:
    trace = ChromeTrace(tmp_path, "a", (SCHEDULER,))
    for n in range(4):
        trace.span(SCHEDULER, f"step {n}", float(n), 0.5, {})
    trace._file._file.flush()
    path = tmp_path / "a.trace.json"
    path.write_bytes(path.read_bytes()[:-cut])
    names = [event["name"] for event in read_events(path)]
    assert names == ["process_name", *(f"step {n}" for n in range(4))][: len(names)]
    assert len(names) >= 4
    trace._file.close()


def test_nothing_to_merge_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError):
        merge(tmp_path)
    assert main([str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    assert main([]) == 2
    with pytest.raises(ConfigError):
        ChromeTrace("/proc/none", "a", ())
