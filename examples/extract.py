"""Structured extraction: texts in, checked Python objects out. Start a server with `python launch.py`, then

python examples/extract.py [--base-url URL] [TEXT ...]

Needs pip install openai 'vibe-sgl-lite[grammar]'; pydantic comes with openai.
"""

import argparse
import sys
from typing import Literal

from openai import LengthFinishReasonError, OpenAI
from pydantic import BaseModel, Field


class Person(BaseModel):
    """What to find. A grammar made of it guides the model, so every answer parses; bounds keep answers short."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)
    colour: Literal["red", "green", "blue", "yellow"]


def extract(client: OpenAI, model: str, text: str) -> Person | None:
    """None where max_tokens did not suffice."""
    try:
        answer = client.chat.completions.parse(
            model=model,
            messages=[{"role": "user", "content": f"Write JSON: {text}"}],
            response_format=Person,
            temperature=0,
            max_tokens=100,
            reasoning_effort="none",
        )
    except LengthFinishReasonError:
        return None
    return answer.choices[0].message.parsed


def not_in(text: str, person: Person) -> list[str]:
    """Fields whose value the text does not have. A grammar ensures the form of an answer, never that it is true."""
    return [name for name, value in person if str(value).lower() not in text.lower()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # The model inside the package reads lists of this kind, and little else.
    texts = ["name Anna, age 31, colour blue", "colour red, name Ben, age 7", "name Frank, colour green"]
    parser.add_argument("texts", nargs="*", metavar="TEXT", default=texts)
    parser.add_argument("--base-url", default="http://127.0.0.1:30000/v1")
    parser.add_argument("--api-key", default="none")
    args = parser.parse_args()
    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    model = client.models.list().data[0].id
    for text in args.texts:
        person = extract(client, model, text)
        if person is None:
            print(f"{text!r}: cut off", file=sys.stderr)
        else:
            made_up = not_in(text, person)
            print(f"{text!r} -> {person!r}" + (f", not in the text: {', '.join(made_up)}" if made_up else ""))
