"""Print text while it is generated: start a daemon with `python launch.py`, then

python examples/streaming.py [--address ADDRESS] [PROMPT]
"""

import argparse
import time

from vibe_sgl_lite import Client, SamplingParams

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt", nargs="?", default="Once upon a time")
parser.add_argument("--address", help="as the daemon's ready line shows it; default: the daemon called 'default'")
args = parser.parse_args()

with Client(args.address) as client:
    print(args.prompt, end="", flush=True)
    start = time.perf_counter()
    first = None
    # Chunks are deltas: print them one after the other. The last one says why it ended and what was used.
    for chunk in client.stream(args.prompt, SamplingParams(max_new_tokens=64)):
        first = first or time.perf_counter() - start
        print(chunk.text, end="", flush=True)
        if chunk.finish_reason is not None and chunk.usage is not None:
            took = time.perf_counter() - start
            print(
                f"\n[{chunk.finish_reason}: {chunk.usage.completion_tokens} tokens in {took:.2f} s, "
                f"the first after {(first or 0) * 1000:.0f} ms]"
            )
