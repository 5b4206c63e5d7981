"""Output that programs can read: JSON by a schema, one of some texts, tool calls, reasoning apart from the answer.

python examples/structured.py [--model-path FOLDER]

Needs the grammar library: pip install 'vibe-sgl-lite[grammar]'
"""

import argparse
import importlib.util
import json

from vibe_sgl_lite import LLM, SamplingParams

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model-path", default="embedded", help="model folder or hub id; default: the embedded model")
args = parser.parse_args()
if importlib.util.find_spec("llguidance") is None:
    parser.exit(1, "the grammar library is missing: pip install 'vibe-sgl-lite[grammar]'\n")

# Bounded strings and numbers, so that max_new_tokens is surely enough.
ANIMAL = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "legs": {"type": "integer", "minimum": 0, "maximum": 8},
    },
    "required": ["name", "legs"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}

with LLM(model_path=args.model_path, log_level="warning") as llm:
    params = SamplingParams(max_new_tokens=100, temperature=0)

    out = llm.generate("A little dog as JSON:", params, json_schema=ANIMAL)
    print(f"json_schema -> {json.loads(out.text)}")

    out = llm.generate("Do dogs like to play?", params, choice=["yes", "no"])
    print(f"choice -> {out.text}")

    # The thinking block is apart from the answer, and may be bounded.
    question = [{"role": "user", "content": "What is 17 + 25?"}]
    out = llm.chat(question, params, max_thinking_tokens=50)
    print(f"chat -> {out.text!r}, after thinking {out.reasoning!r}")

    # The model names a function to call; running it, and telling the result in a "tool" message, is up to you.
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    out = llm.chat(question, params, tools=[WEATHER], enable_thinking=False)
    for call in out.tool_calls:
        print(f"tools -> {call.name}({call.arguments})")
