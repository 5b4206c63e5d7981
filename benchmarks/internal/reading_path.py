"""How much code one request runs through: the files and lines that a newcomer reads to follow it.

    python benchmarks/internal/reading_path.py                       # this checkout
    python benchmarks/internal/reading_path.py --root ../before      # another checkout of the project, for comparison

Starts the engine of that checkout on its embedded model (one rank, CPU), generates from one prompt through `LLM` with
a recorder in every process, and counts the lines of each project file of which at least one function ran. Files that
are only imported (tables, types) do not count, nor do tests; the kernels' C++ sources do where kernels are compiled.
Two paths: launcher and rank, from `launch.py` to the matmul; and all processes, from `generate` to text. Prints a table
and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER_ENV = "READING_PATH_FOLDER"
# Loaded by every Python process below, before anything of the project: notes, once each, which files' functions run.
RECORDER = f'''
import os, sys, threading
folder, root = os.environ["{FOLDER_ENV}"].split(os.pathsep)
seen = set()
def note(frame, event, argument):
    code = frame.f_code
    if event != "call" or code in seen:
        return
    seen.add(code)
    # CO_OPTIMIZED: a function, no module or class body. Installed packages may lie in the checkout, in .venv.
    if code.co_flags & 1 and code.co_filename.startswith(root) and "site-packages" not in code.co_filename:
        with open(os.path.join(folder, str(os.getpid())), "a") as notes:
            notes.write(os.path.realpath(code.co_filename) + "\\n")
with open(os.path.join(folder, str(os.getpid())), "a") as notes:
    notes.write("#" + " ".join(sys.orig_argv) + "\\n")
sys.setprofile(note)
threading.setprofile(note)
'''
# Both checkouts' public face. Rank and launcher are told apart by their command lines.
REQUEST = (
    "from vibe_sgl_lite import LLM, SamplingParams\n"
    "with LLM() as llm:\n"
    "    print(llm.generate('Once upon a time', SamplingParams(max_new_tokens=16, temperature=0)).text)\n"
)


def record(root: Path) -> dict[str, set[str]]:
    """The project files that ran, by process: "rank", "client" (launcher and client, which are one here), "others"."""
    with tempfile.TemporaryDirectory() as name:
        site, notes = Path(name, "site"), Path(name, "notes")
        site.mkdir()
        notes.mkdir()
        (site / "sitecustomize.py").write_text(RECORDER)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join((str(site), str(root))),
            FOLDER_ENV: os.pathsep.join((str(notes), str(root))),
        }
        script = Path(name, "request.py")
        script.write_text(REQUEST)
        subprocess.run([sys.executable, str(script)], env=environment, cwd=root, check=True, stdout=sys.stderr)
        found: dict[str, set[str]] = {"rank": set(), "client": set(), "others": set()}
        for file in notes.iterdir():
            lines = file.read_text().splitlines()
            command = lines[0]
            kind = "rank" if "model_worker.process" in command else "client" if "request.py" in command else "others"
            found[kind].update(lines[1:])
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2])
    root = parser.parse_args().root.resolve()
    found = record(root)
    native = {str(path) for path in root.glob("model_worker/*/native/*") if path.suffix in (".h", ".cpp")}
    launcher = {file for file in found["client"] if "client" not in Path(file).relative_to(root).as_posix()}
    paths = {
        "launch.py to the matmul, Python": found["rank"] | launcher,
        "launch.py to the matmul, kernels": native,
        "generate to text, Python": set().union(*found.values()),
    }
    result = {}
    for title, files in paths.items():
        lines = {file: len(Path(file).read_text().splitlines()) for file in files}
        result[title] = {"files": len(files), "lines": sum(lines.values())}
        print(f"\n{title}: {len(files)} files, {sum(lines.values())} lines")
        for file, count in sorted(lines.items(), key=lambda item: -item[1]):
            print(f"  {count:5}  {Path(file).relative_to(root)}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
