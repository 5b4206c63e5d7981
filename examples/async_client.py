"""Many requests at once from one asyncio program: start a daemon with `python launch.py`, then

python examples/async_client.py [--address ADDRESS]
"""

import argparse
import asyncio

from vibe_sgl_lite import AsyncClient, SamplingParams


async def main(address: str | None) -> None:
    async with AsyncClient(address) as client:
        # Tasks share one connection; the engine batches what runs at the same time.
        params = SamplingParams(max_new_tokens=16, temperature=0)
        prompts = [f"{name} went to the" for name in ("Anna", "Ben", "Carl", "Dora")]
        outs = await asyncio.gather(*(client.generate(prompt, params) for prompt in prompts))
        for prompt, out in zip(prompts, outs, strict=True):
            print(f"{prompt} ... {out.text!r}")

        # A stream that is left early is aborted in the engine, and so is every request of a cancelled task.
        count = 0
        async for chunk in client.stream("Once upon a time", SamplingParams(max_new_tokens=200, ignore_eos=True)):
            count += len(chunk.token_ids)
            if count >= 5:
                break
        print(f"left after {count} tokens")


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--address", help="as the daemon's ready line shows it; default: the daemon called 'default'")
asyncio.run(main(parser.parse_args().address))
