"""`vibe-sgl-lite chat`: talk in the terminal, streaming, with history.

    vibe-sgl-lite chat                      with the daemon called 'default' if one runs, else an engine of its own
    vibe-sgl-lite chat --address ADDRESS    with a running daemon
    vibe-sgl-lite chat --model-path FOLDER  with an engine of its own on another model

/reset forgets the conversation, /system TEXT begins a new one under a system prompt, /quit (or Ctrl-D) leaves, Ctrl-C
cuts an answer short.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from vibe_sgl_lite.runtime.client.client import Client
from vibe_sgl_lite.runtime.client.llm import LLM
from vibe_sgl_lite.runtime.errors import ConnectError, EngineDeadError, EngineError, RequestError
from vibe_sgl_lite.runtime.settings.sampling_params import SamplingParams

KEYS = "/reset forgets, /system TEXT sets a system prompt, /quit leaves, Ctrl-C cuts an answer short"
# How the thinking block is set off from the answer.
DIM, PLAIN = ("\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "")


def connect(address: str | None, model_path: str | None) -> Client:
    """The daemon that was named; else the default one, unless a model was named or none runs; else our own engine."""
    if address is not None:
        return Client(address)
    if model_path is None:
        try:
            return Client()
        except ConnectError:
            pass
    print("starting an engine ...", file=sys.stderr)
    return LLM(model_path or "embedded", log_level="warning")


def answer(client: Client, history: list[dict[str, str]], params: SamplingParams, thinking: bool | None) -> str:
    """Print the answer while it comes, then how fast it came and how much of the prompt was cached. Returns it."""
    text = ""
    thought = False  # a thinking block was shown, and nothing after it yet
    start = time.perf_counter()
    first = None  # when the first token came: the speed is that of the tokens after it
    try:
        # Leaving the block early, as on Ctrl-C, aborts the request in the engine.
        with client.stream_chat(history, params, enable_thinking=thinking) as stream:
            for chunk in stream:
                first = first or time.perf_counter()
                text += chunk.text
                if chunk.reasoning:
                    print(f"{DIM}{chunk.reasoning}{PLAIN}", end="", flush=True)
                    thought = True
                if chunk.text:
                    print("\n\n" * thought + chunk.text, end="", flush=True)
                    thought = False
                if chunk.usage is not None and first is not None:
                    count, took = chunk.usage.completion_tokens, time.perf_counter() - first
                    speed = f", {(count - 1) / took:.1f} tokens/s" if count > 1 and took > 0 else ""
                    print(
                        f"\n[{count} tokens{speed}, the first after {(first - start) * 1000:.0f} ms; "
                        f"{chunk.usage.cached_tokens} of {chunk.usage.prompt_tokens} prompt tokens were cached; "
                        f"{chunk.finish_reason}]"
                    )
    except KeyboardInterrupt:
        print("\n[cut short]")
    return text


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "vibe-sgl-lite chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", help="as the daemon's ready line shows it")
    parser.add_argument("--model-path", help="model folder or hub id, for an engine of its own")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="longest answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the model's own)")
    parser.add_argument("--no-thinking", action="store_true", help="ask for answers without a thinking block")
    args = parser.parse_args(argv)
    limits = {"max_new_tokens": args.max_new_tokens}
    heat = {} if args.temperature is None else {"temperature": args.temperature}
    try:
        params = SamplingParams(**limits, **heat)
        with connect(args.address, args.model_path) as client:
            print(f"{client.model.name}: {KEYS}")
            talk(client, params, thinking=False if args.no_thinking else None)
    except (ValueError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def talk(client: Client, params: SamplingParams, thinking: bool | None) -> None:
    history: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/quit":
            return
        if line == "/reset":
            history.clear()
            print("[forgotten]")
        elif line.startswith("/system"):
            text = line.removeprefix("/system").strip()
            history[:] = [{"role": "system", "content": text}] if text else []
            print("[a new conversation]")
        elif line:
            history.append({"role": "user", "content": line})
            try:
                history.append({"role": "assistant", "content": answer(client, history, params, thinking)})
            except EngineDeadError:
                raise
            except (RequestError, EngineError) as error:  # too long for the context, or the engine is overloaded
                history.pop()
                print(f"\n[{error}]")
