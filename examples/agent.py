"""An agent: the model calls Python functions until it can answer. Start a server with `python launch.py`, then

python examples/agent.py [--base-url URL] [QUESTION]

Needs pip install openai 'vibe-sgl-lite[grammar]'.
"""

import argparse
import inspect
import json
from collections.abc import Callable
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

from openai import OpenAI

ZONES = {"Paris": "Europe/Paris", "Tokyo": "Asia/Tokyo", "Cairo": "Africa/Cairo"}
WEATHER = {"Paris": {"weather": "sunny", "degrees": 21}, "Tokyo": {"weather": "rainy", "degrees": 17}}


# The tools: plain functions. Name, docstring and annotations become what the model is shown.
def get_weather(city: str) -> dict[str, Any]:
    """Get the weather in a city."""
    return WEATHER[city]  # ask a real service here


def get_time(city: str) -> dict[str, Any]:
    """Get the time in a city."""
    return {"time": datetime.now(ZoneInfo(ZONES[city])).strftime("%H:%M")}


def set_timer(minutes: int) -> dict[str, Any]:
    """Set a timer."""
    return {"ok": 0 < minutes <= 24 * 60}


TOOLS: dict[str, Callable[..., dict[str, Any]]] = {tool.__name__: tool for tool in (get_weather, get_time, set_timer)}
TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}


def description(tool: Callable[..., dict[str, Any]]) -> Any:
    """A function in OpenAI's form."""
    annotations = inspect.get_annotations(tool, eval_str=True)
    names = [*inspect.signature(tool).parameters]
    schema = {
        "type": "object",
        "properties": {name: {"type": TYPES[annotations[name]]} for name in names},
        "required": names,
        "additionalProperties": False,
    }
    about = {"name": tool.__name__, "description": inspect.getdoc(tool), "parameters": schema}
    return {"type": "function", "function": about}


def run_tool(name: str, arguments: str) -> str:
    """What the model is told. It hears of a mistake too, and may try again: a call's arguments are only text."""
    try:
        return json.dumps(TOOLS[name](**json.loads(arguments)))
    except (KeyError, TypeError, ValueError) as error:
        return json.dumps({"error": f"{type(error).__name__}: {error}"})


def ask(client: OpenAI, question: str, most_calls: int) -> str | None:
    """The answer; None where the model still wanted to call something after `most_calls` rounds."""
    model = client.models.list().data[0].id
    tools = [description(tool) for tool in TOOLS.values()]
    messages: list[Any] = [{"role": "user", "content": question}]
    for turn in range(most_calls + 1):
        # "required" is enforced by a grammar: even a small model makes a call, and its arguments fit the schema. Leave
        # "auto" to a model that knows by itself when to call.
        choice: Any = "required" if turn == 0 else "auto"
        answer = client.chat.completions.create(
            model=model, messages=messages, tools=tools, tool_choice=choice, parallel_tool_calls=False,
            temperature=0, reasoning_effort="none",
        )  # fmt: skip
        message = answer.choices[0].message
        if not message.tool_calls:
            return message.content
        messages.append(message)
        for call in message.tool_calls:
            if call.type == "function":
                result = run_tool(call.function.name, call.function.arguments)
                print(f"{call.function.name}({call.function.arguments}) -> {result}")
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default="What is the weather in Paris?")
    parser.add_argument("--base-url", default="http://127.0.0.1:30000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--most-calls", type=int, default=5, help="rounds of calls before giving up")
    args = parser.parse_args()
    print(ask(OpenAI(base_url=args.base_url, api_key=args.api_key), args.question, args.most_calls))
