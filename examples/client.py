"""Talk to a running daemon: start one with `python launch.py`, then

python examples/client.py [--address ADDRESS]
"""

import argparse

from vibe_sgl_lite import Client, RequestError, SamplingParams

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--address", help="as the daemon's ready line shows it; default: the daemon called 'default'")
args = parser.parse_args()

with Client(args.address) as client:
    print(f"connected to {client.model.name} on {client.model.device}")

    # One prompt gives one output. With a seed, the same request gives the same text, whatever else runs.
    params = SamplingParams(max_new_tokens=24, temperature=0.8, seed=42)
    first = client.generate("Once upon a time", params)
    again = client.generate("Once upon a time", params)
    print(f"{first.text!r}\nthe same again: {first.token_ids == again.token_ids}")

    # Token ids work as well as text, and every prompt may have parameters of its own.
    short, long = client.generate(
        input_ids=[first.token_ids, first.token_ids],
        sampling_params=[SamplingParams(max_new_tokens=2), SamplingParams(max_new_tokens=8)],
    )
    print(f"{len(short.token_ids)} and {len(long.token_ids)} tokens at most 2 and 8")

    # What is wrong with a request is told by name.
    try:
        client.generate("Hello", SamplingParams(max_new_tokens=10**9))
    except RequestError as error:
        print(f"refused, field {error.field}: {error}")

    stats = client.stats()
    print(f"KV pages: {stats['kv_pages_total']}, free: {stats['kv_pages_free']}, cached: {stats['kv_pages_cached']}")
