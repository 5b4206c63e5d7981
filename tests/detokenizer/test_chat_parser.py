"""What is taken out of a chat's text: thinking blocks and tool calls, in one go."""

import pytest

from vibe_sgl_lite.detokenizer.chat_parser import ChatParser, Parsed
from vibe_sgl_lite.runtime.messages.parts import TextFormat
from vibe_sgl_lite.runtime.text.chat_format import parse_tool_call

BOTH = TextFormat(think=True, tools=True)
CALL = '{"name": "add", "arguments": {"a": 1}}'
TAGGED = '{"name": "say", "arguments": {"text": "<tool_call>\\"x\\"</tool_call>\\\\", "n": 1}}'
TAGGED_BLOCK = f"<tool_call>\n{TAGGED}\n</tool_call>"
BLOCK = f"<tool_call>\n{CALL}\n</tool_call>"


def parsed(text: str, text_format: TextFormat = BOTH) -> Parsed:
    parser = ChatParser(text_format)
    first, rest = parser.add(text), parser.end()
    return Parsed(first.text + rest.text, first.reasoning + rest.reasoning, first.tool_calls + rest.tool_calls)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Parsed()),
        ("hello\n", Parsed("hello\n")),
        ("<think>\nwhy\n\nso\n</think>\n\nhello", Parsed("hello", "why\n\nso")),
        ("<think>\n\n</think>\n\nhello", Parsed("hello")),
        ("<think></think>hello", Parsed("hello")),
        ("<think>\nnever closed\n", Parsed("", "never closed")),
        ("<think>a</thi", Parsed("", "a</thi")),
        ("<thi", Parsed("<thi")),
        ("\n<think>a</think>", Parsed("\n<think>a</think>")),
        ("x <think>a</think>", Parsed("x <think>a</think>")),
        ("<think>a</think>b<think>c</think>", Parsed("b<think>c</think>", "a")),
        (BLOCK, Parsed(tool_calls=(CALL,))),
        (f"<think>\na\n</think>\n\nI will.\n{BLOCK}\n{BLOCK}\n", Parsed("I will.", "a", (CALL, CALL))),
        (f"<think>{BLOCK}</think>", Parsed("", BLOCK)),
        (f"{BLOCK}\n\nDone.\n", Parsed("\n\nDone.\n", "", (CALL,))),
        ("a\n<tool_call>\n{}\n</tool_call>\n", Parsed("a\n<tool_call>\n{}\n</tool_call>\n")),
        (
            "a\n<tool_call>\n{nonsense\n</tool_call>" + BLOCK,
            Parsed("a\n<tool_call>\n{nonsense\n</tool_call>", "", (CALL,)),
        ),
        (f"{TAGGED_BLOCK}b", Parsed("b", "", (TAGGED,))),
        (f"{TAGGED_BLOCK}{BLOCK}", Parsed("", "", (TAGGED, CALL))),
        (  # a text that never ends hides no later call
            '<tool_call>{"name": "f}</tool_call>' + BLOCK,
            Parsed('<tool_call>{"name": "f}</tool_call>', "", (CALL,)),
        ),
        ('<tool_call>{"name": "f</tool_call>', Parsed('<tool_call>{"name": "f</tool_call>')),
        (f"a\n<tool_call>\n{CALL}\n", Parsed(f"a\n<tool_call>\n{CALL}\n")),
        ("a <tool_ca", Parsed("a <tool_ca")),
        ("</tool_call>", Parsed("</tool_call>")),
    ],
)
def test_blocks_are_taken_out(text: str, expected: Parsed) -> None:
    assert parsed(text) == expected


def test_a_prompt_that_opened_the_block() -> None:
    inside = TextFormat(think=True, inside=True, tools=False)
    assert parsed("\nwhy\n</think>\n\nhello", inside) == Parsed("hello", "why")
    assert parsed("why", inside) == Parsed("", "why")
    assert parsed(f"</think>{BLOCK}", inside) == Parsed(BLOCK)  # no tools were given


def test_formats_without_thinking_or_tools() -> None:
    text = f"<think>a</think>\n{BLOCK}\n"
    assert parsed(text, TextFormat()) == Parsed(text)
    assert parsed(text, TextFormat(tools=True)) == Parsed("<think>a</think>", "", (CALL,))


@pytest.mark.parametrize(
    "raw",
    [
        "",
        "[]",
        "{",
        '{"arguments": {}}',
        '{"name": 5, "arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"name": "f", "arguments": []}',
        '{"name": "f", "arguments": "{}"}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {}} {}',
        "[" * 100_000,
        '{"name": "f", "arguments": {"a": ' + "1" * 10_000 + "}}",
    ],
)
def test_what_is_no_call(raw: str) -> None:
    assert parse_tool_call(raw) is None


def test_a_call() -> None:
    raw = '{"arguments": {"big": 123456789012345678901234567890, "text": "ü\\ud800"}, "name": "f"}'
    call = parse_tool_call(raw)
    assert call is not None
    assert (call.name, call.raw) == ("f", raw)
    assert call.arguments == {"big": 123456789012345678901234567890, "text": "ü\ud800"}
    for key in ("parameters", "arguments"):
        call = parse_tool_call(f'{{"name": "f", "{key}": {{"a": 1}}}}')
        assert call is not None
        assert call.arguments == {"a": 1}
    call = parse_tool_call('{"name": "f", "parameters": {}, "arguments": {"a": 1}}')
    assert call is not None
    assert call.arguments == {"a": 1}
    assert parse_tool_call('{"name": "f", "parameters": [1]}') is None
    call = parse_tool_call('{"name": "now"}')
    assert call is not None
    assert call.arguments == {}
