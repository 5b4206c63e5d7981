"""An engine of your own inside your program: no daemon needed.

python examples/offline.py [--model-path FOLDER]
"""

import argparse

from vibe_sgl_lite import LLM, SamplingParams

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model-path", default="embedded", help="model folder or hub id; default: the embedded model")
args = parser.parse_args()

# LLM spawns the engine's processes and stops them at the end of the block. Its keywords are launch.py's flags.
with LLM(model_path=args.model_path, log_level="warning") as llm:
    # A list of prompts gives a list of outputs, in the same order; the engine runs them together, batched.
    prompts = ["Once upon a time", "Once upon a time there was a bear", "Once there was a little fox"]
    params = SamplingParams(max_new_tokens=40, temperature=0)
    for prompt, out in zip(prompts, llm.generate(prompts, params), strict=True):
        print(f"{prompt!r} -> {out.text!r} ({out.finish_reason})")

    # chat applies the model's own template. usage tells how much was computed and how much was found in the cache.
    answer = llm.chat([{"role": "user", "content": "What is 17 + 25?"}], params, enable_thinking=False)
    print(f"chat -> {answer.text!r}")
    print(f"usage: {answer.usage}")
