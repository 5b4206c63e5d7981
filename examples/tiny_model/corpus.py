"""The training corpus: an endless, seeded stream of documents, and their packing into rows of tokens.

A document is a list of segments, each with a loss weight: 0 for what a user, a tool or the template says, 1 for an
answer, less for the free text of stories, of which there is much more. The same seed gives the same corpus everywhere.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from tokenizers import Tokenizer

from examples.tiny_model import chat
from examples.tiny_model.stories import story
from examples.tiny_model.tasks import draw_list, held_out, lookup_question
from examples.tiny_model.template import render_chat

END_OF_TEXT = "<|endoftext|>"
STORY_WEIGHT = 0.25
THINKING_SHARE = 0.4


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a document and the weight of its tokens in the loss. Token borders never cross segments."""

    text: str
    weight: float


@dataclass(frozen=True, slots=True)
class Rows:
    """`count` packed rows of `length` tokens each, row after row.

    `ids` are int32 token ids; `weights` float32, the loss weight of predicting the token at the same place.
    """

    count: int
    length: int
    ids: "array[int]"
    weights: "array[float]"


def document(rng: Random) -> list[Segment]:
    """One short document, of a kind drawn by weight."""
    kind = rng.random()
    if kind < 0.07:
        return raw_text(story(rng))
    if kind < 0.08:
        return raw_text(chat.fact_statement(rng))
    if kind < 0.18:
        return lookup_drill(rng)
    return dialogue_segments(_dialogue(rng), thinking=rng.random() < THINKING_SHARE)


def long_document(rng: Random, tokens: int) -> list[Segment]:
    """One document of very roughly `tokens` tokens, whose end depends little or much on its far beginning."""
    return dialogue_segments(chat.long_chat(rng, stories=tokens // 170), thinking=rng.random() < THINKING_SHARE)


def _dialogue(rng: Random) -> chat.Dialogue:
    kind = rng.random()
    if kind < 0.03:
        return chat.story_request(rng)
    if kind < 0.10:
        return chat.small_talk(rng)
    if kind < 0.15:
        return chat.tool_use(rng, held=False)
    if kind < 0.18:
        return chat.own_name(rng, held=False)
    if kind < 0.26:
        return chat.turns(rng, chat.trained_question(rng), earlier=rng.randint(1, 4))
    return chat.ask(chat.trained_question(rng), rng)


def raw_text(text: str) -> list[Segment]:
    """Plain text outside any chat, up to the end-of-text token."""
    return [Segment(text, STORY_WEIGHT), Segment(END_OF_TEXT, STORY_WEIGHT)]


def lookup_drill(rng: Random) -> list[Segment]:
    """A list and then each of its trained look-ups as plain text, loss on the values.

    Finding a word's value is what the models learn last; here one list gives many examples of it, outside any chat.
    """
    keys, values = draw_list(rng, 8)
    order = rng.sample(range(len(keys)), len(keys))
    questions = [lookup_question(rng, keys, values, chosen) for chosen in order]
    listed = ", ".join(f"{key}: {value}" for key, value in zip(keys, values, strict=True))
    segments = [Segment(f"{listed}.", 0.0)]
    form = " What is {}? " if rng.random() < 0.6 else " {}: "
    for chosen, question in zip(order, questions, strict=True):
        if not held_out(question.task, question.item):
            lead = form.format(keys[chosen])
            # A digit has no space in its token, a word has.
            space = "" if values[chosen].isdigit() else " "
            segments.append(Segment(lead if not space else lead[:-1], 0.0))
            segments.append(Segment(space + values[chosen], 1.0))
            segments.append(Segment(".", 0.0))
    return [*segments, Segment(END_OF_TEXT, STORY_WEIGHT)]


def dialogue_segments(dialogue: chat.Dialogue, *, thinking: bool) -> list[Segment]:
    """The dialogue in chat format, loss only on what the model itself has to write in its last turn."""
    weight = STORY_WEIGHT if dialogue.task == "story" else 1.0
    prompt = render_chat(dialogue.messages, tools=dialogue.tools, enable_thinking=thinking)
    segments = [Segment(prompt, 0.0)]
    if thinking:
        segments.append(Segment(f"<think>\n{dialogue.thinking}\n</think>\n\n", 1.0))
    return [*segments, Segment(dialogue.answer, weight), Segment("<|im_end|>", 1.0), Segment("\n", 0.0)]


def text_of(segments: list[Segment]) -> str:
    """The document as one text."""
    return "".join(segment.text for segment in segments)


def tokenizer_texts(seed: int, documents: int) -> Iterator[str]:
    """Documents as plain texts, to train the tokenizer on."""
    rng = Random(f"tokenizer:{seed}")
    for _ in range(documents):
        yield text_of(document(rng))


def pack(tokenizer: Tokenizer, seed: str, count: int, length: int) -> Rows:
    """Rows of whole documents one after another, each row beginning with a fresh one and its last one cut off.

    In rows of 1,024 tokens and more, every second row begins with one long document.
    """
    rng = Random(f"rows:{seed}")
    ids, weights = array("i"), array("f")
    for row in range(count):
        end = len(ids) + length
        if length >= 1024 and row % 2 == 0:
            _append(tokenizer, long_document(rng, rng.randint(200, int(length * 0.8))), ids, weights)
        while len(ids) < end:
            _append(tokenizer, document(rng), ids, weights)
        del ids[end:], weights[end:]
    return Rows(count, length, ids, weights)


def _append(tokenizer: Tokenizer, segments: list[Segment], ids: "array[int]", weights: "array[float]") -> None:
    for segment in segments:
        encoded = tokenizer.encode(segment.text, add_special_tokens=False).ids
        ids.extend(encoded)
        weights.extend([segment.weight] * len(encoded))
