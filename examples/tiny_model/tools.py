"""The tools that training offers, and requests that use them. Knows nothing about chat format or tokens."""

from dataclasses import dataclass
from random import Random
from typing import Any

from examples.tiny_model.words import CITIES, COLOURS, NAMES


def _tool(name: str, description: str, **properties: str) -> dict[str, Any]:
    """A function in OpenAI's description format; every property, given as name=type, is required."""
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": kind} for key, kind in properties.items()},
                "required": list(properties),
            },
        },
    }


TOOL_BOX: tuple[dict[str, Any], ...] = (
    _tool("get_weather", "Get the weather in a city.", city="string"),
    _tool("get_time", "Get the time in a city.", city="string"),
    _tool("set_timer", "Set a timer.", minutes="integer"),
    _tool("send_message", "Send a message to a person.", to="string", text="string"),
    _tool("set_light", "Set the colour of the light.", colour="string"),
)


@dataclass(frozen=True, slots=True)
class ToolUse:
    """A request, the call that fits it, what the tool returns, and what to say then."""

    request: str
    name: str
    arguments: dict[str, Any]
    result: dict[str, Any]
    reply: str


def draw_use(rng: Random) -> ToolUse:
    """A random request that one tool of `TOOL_BOX` fits."""
    kind = rng.randrange(5)
    city, name, colour, minutes = rng.choice(CITIES), rng.choice(NAMES), rng.choice(COLOURS), rng.randint(1, 90)
    if kind == 0:
        sky, degrees = rng.choice(["sunny", "cloudy", "rainy", "windy", "snowy"]), rng.randint(-9, 39)
        request = rng.choice([f"What is the weather in {city}?", f"How is the weather in {city}?"])
        reply = f"It is {sky} in {city}, {degrees} degrees."
        return ToolUse(request, "get_weather", {"city": city}, {"weather": sky, "degrees": degrees}, reply)
    if kind == 1:
        clock = f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
        request = rng.choice([f"What time is it in {city}?", f"Tell me the time in {city}."])
        return ToolUse(request, "get_time", {"city": city}, {"time": clock}, f"It is {clock} in {city}.")
    if kind == 2:
        request = rng.choice([f"Set a timer for {minutes} minutes.", f"Wake me in {minutes} minutes."])
        reply = f"The timer is set for {minutes} minutes."
        return ToolUse(request, "set_timer", {"minutes": minutes}, {"ok": True}, reply)
    if kind == 3:
        text = rng.choice(["hello", "good morning", "come home", "I am late", "see you soon", "happy birthday"])
        request = f"Send {name} the message: {text}"
        return ToolUse(
            request, "send_message", {"to": name, "text": text}, {"ok": True}, f"The message to {name} was sent."
        )
    request = rng.choice([f"Make the light {colour}.", f"Turn the light {colour}."])
    return ToolUse(request, "set_light", {"colour": colour}, {"ok": True}, f"The light is {colour} now.")
