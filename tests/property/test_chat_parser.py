"""Streaming parses of chats equal the parse in one go, however the text is cut; nothing is lost or shown twice."""

from hypothesis import given, settings
from hypothesis import strategies as st

from vibe_sgl_lite.detokenizer.chat_parser import ChatParser, Parsed
from vibe_sgl_lite.runtime.messages.parts import TextFormat

TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
PARTS = ["<", "th", "</", "think>", "<tool_", "call>", "\n", "\n\n", " ", "a", "語"]
CALLS = ['{"name": "f", "arguments": {}}', '{"name": "f"', "}", "\n{", '"', "\\", '{"name": "f</tool_call>"}']
PIECES = st.sampled_from([*TAGS, *PARTS, *CALLS])
TEXTS = st.lists(PIECES, max_size=14).map("".join)
FORMATS = st.builds(TextFormat, think=st.booleans(), inside=st.booleans(), tools=st.booleans())


def run(text_format: TextFormat, pieces: list[str]) -> list[Parsed]:
    parser = ChatParser(text_format)
    return [*map(parser.add, pieces), parser.end()]


def joined(parts: list[Parsed]) -> Parsed:
    calls = tuple(raw for part in parts for raw in part.tool_calls)
    return Parsed("".join(part.text for part in parts), "".join(part.reasoning for part in parts), calls)


@settings(max_examples=600, deadline=None)
@given(FORMATS, TEXTS, st.data())
def test_any_cut_gives_the_same(text_format: TextFormat, text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = joined(run(text_format, [text]))
    assert joined(run(text_format, pieces)) == whole
    assert joined(run(text_format, list(text))) == whole
    if not text_format.think and not text_format.tools:
        assert whole == Parsed(text)


@settings(max_examples=500, deadline=None)
@given(st.text(), st.text(), st.lists(st.text(max_size=5), max_size=3))
def test_what_a_template_writes_comes_back(reasoning: str, answer: str, names: list[str]) -> None:
    """The inverse of how templates write an assistant's turn, tags aside."""
    names = ["f" + "".join(c for c in name if c.isalnum() and c.isascii()) for name in names]
    reasoning, answer = (t.replace("<", "").strip("\n") for t in (reasoning, answer))
    calls = [f'{{"name": "{name}", "arguments": {{}}}}' for name in names]
    blocks = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
    text = f"<think>\n{reasoning}\n</think>\n\n{answer}" + ("\n" if answer and blocks else "") + blocks
    assert joined(run(TextFormat(think=True, tools=True), [text])) == Parsed(answer, reasoning, tuple(calls))
