"""Whole conversations: small talk, facts, stories on request, several turns, tool use.

A `Dialogue` is everything before the assistant's last turn, and that turn. Knows nothing about tokens or training rows.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from examples.tiny_model.stories import article, draw_cast, story
from examples.tiny_model.talk import FACTS, TALK, UNKNOWN
from examples.tiny_model.tasks import TASK_WEIGHTS, Question, draw, held_out, recall
from examples.tiny_model.template import Message, Tool
from examples.tiny_model.tools import TOOL_BOX, ToolUse, draw_use
from examples.tiny_model.words import ADJECTIVES, ANIMALS, EVERYDAY, NAMES, OBJECTS, VERBS

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant. Answer briefly.",
    "Answer the question.",
    "You are a tiny language model.",
    "Be kind and be short.",
)


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation up to its last answer. `tools` are offered to the model; `task` names what is asked last."""

    task: str
    messages: tuple[Message, ...]
    thinking: str
    answer: str
    tools: tuple[Tool, ...] = ()


def fact_statement(rng: Random) -> str:
    """A few facts as plain sentences, such as "The capital of France is Paris."."""
    return " ".join(f"{start} {answer}." for _, start, answer in rng.sample(FACTS, rng.randint(1, 4)))


def ask(question: Question, rng: Random) -> Dialogue:
    """`question` as a one-turn conversation, sometimes after a system prompt."""
    return Dialogue(question.task, (*_system(rng), _user(question.text)), question.thinking, question.answer)


def trained_question(rng: Random) -> Question:
    """A question that is not held out, tasks drawn by their weights."""
    task = rng.choices(list(TASK_WEIGHTS), weights=list(TASK_WEIGHTS.values()))[0]
    return draw(task, rng, held=False)


def turns(rng: Random, last: Question, earlier: int) -> Dialogue:
    """`last` after `earlier` other trained questions with their answers."""
    history = [
        message
        for question in (trained_question(rng) for _ in range(earlier))
        for message in (_user(question.text), _assistant(question.answer))
    ]
    return Dialogue("turns", (*_system(rng), *history, _user(last.text)), last.thinking, last.answer)


def own_name(rng: Random, *, held: bool) -> Dialogue:
    """The user's name, a few other turns, then the question for the name."""
    while True:
        name, word = rng.choice(NAMES), rng.choice(EVERYDAY)
        if held_out("own_name", (name, word)) == held:
            break
    middle = [_user(f"Repeat: {word}"), _assistant(word)] if held or rng.random() < 0.6 else []
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        question = trained_question(rng)
        middle += [_user(question.text), _assistant(question.answer)]
    opening = [_user(f"My name is {name}."), _assistant(f"Nice to meet you, {name}!")]
    return Dialogue(
        "own_name",
        (*_system(rng), *opening, *middle, _user("What is my name?")),
        f"The user said: My name is {name}.",
        f"Your name is {name}.",
    )


def small_talk(rng: Random) -> Dialogue:
    """Greetings, questions about the model, facts, and questions it cannot answer."""
    kind = rng.random()
    if kind < 0.5:
        texts, thinking, answer = rng.choice(TALK[:1] * 3 + TALK)
        return Dialogue("talk", (*_system(rng), _user(rng.choice(texts))), thinking, answer)
    if kind < 0.6:
        name = rng.choice(NAMES)
        return Dialogue(
            "talk",
            (*_system(rng), _user(f"My name is {name}.")),
            "The user tells a name.",
            f"Nice to meet you, {name}!",
        )
    if kind < 0.8:
        question, start, answer = rng.choice(FACTS)
        return Dialogue("talk", (*_system(rng), _user(question)), f"I know this: {start} {answer}.", f"{answer}")
    return Dialogue("talk", (*_system(rng), _user(_unknown(rng))), "I do not know this.", UNKNOWN)


def story_request(rng: Random) -> Dialogue:
    """A story about a given animal, person or thing."""
    kind = rng.random()
    if kind < 0.4:
        text = rng.choice(
            ["Tell me a story.", "Tell a story", "tell me a story", "Write a short story.", "A story, please!"]
        )
        cast = draw_cast(rng)
    elif kind < 0.75:
        animal = rng.choice(ANIMALS)
        text = rng.choice(["Tell me a story about {}.", "Write a short story about {}.", "Write a story about {}"])
        text, cast = text.format(article(animal)), draw_cast(rng, kind=animal)
    else:
        name = rng.choice(NAMES)
        text = rng.choice(["Tell me a story about {}.", "Write a story about {}."])
        text, cast = text.format(name), draw_cast(rng, name=name)
    thinking = f"A story about {cast.hero} the {cast.kind}."
    return Dialogue("story", (*_system(rng), _user(text)), thinking, story(rng, cast))


def tool_use(rng: Random, *, held: bool) -> Dialogue:
    """A request that one of the offered tools fits: the call, or the answer once the tool has spoken.

    Of the trained ones, some offer tools that do not fit, and the answer is given directly.
    """
    while True:
        use = draw_use(rng)
        if held_out("tool", (use.name, *map(str, use.arguments.values()))) == held:
            break
    others = [tool for tool in TOOL_BOX if tool["function"]["name"] != use.name]
    tools = [
        *rng.sample(others, rng.randint(0, 2)),
        *(tool for tool in TOOL_BOX if tool["function"]["name"] == use.name),
    ]
    rng.shuffle(tools)
    kind = rng.random()
    if not held and kind < 0.2:
        question = draw(rng.choice(["add", "sub", "sort", "copy", "lookup"]), rng, held=False)
        return Dialogue("tool", (_user(question.text),), question.thinking, question.answer, tuple(tools))
    if kind < 0.6:
        return Dialogue("tool_call", (_user(use.request),), f"I should call {use.name}.", call_text(use), tuple(tools))
    result = json.dumps(use.result)
    history = (
        _user(use.request),
        {"role": "assistant", "content": call_text(use)},
        {"role": "tool", "content": result},
    )
    return Dialogue("tool_answer", history, "The tool has answered.", use.reply, tuple(tools))


def call_text(use: ToolUse) -> str:
    """The assistant's text that makes this call."""
    return "<tool_call>\n" + json.dumps({"name": use.name, "arguments": use.arguments}) + "\n</tool_call>"


def long_chat(rng: Random, stories: int) -> Dialogue:
    """A conversation whose answer comes after about `stories` stories of text (100 to 200 tokens each)."""
    kind = rng.random()
    if kind < 0.35:
        while held_out("recall", (question := recall(rng, max(1, stories))).item):
            pass
        return ask(question, rng)
    if kind < 0.7:
        library = "\n\n".join(story(rng) for _ in range(max(1, stories)))
        prompt = {"role": "system", "content": f"You are a helpful assistant. You know these stories.\n\n{library}"}
        question = trained_question(rng)
        return Dialogue(question.task, (prompt, _user(question.text)), question.thinking, question.answer)
    return turns(rng, trained_question(rng), max(2, 4 * stories))


def _unknown(rng: Random) -> str:
    animal, thing, name = rng.choice(ANIMALS), rng.choice(OBJECTS), rng.choice(NAMES)
    adjective, verb = rng.choice(ADJECTIVES), rng.choice(VERBS)
    return rng.choice(
        [
            f"Why is the {animal} {adjective}?",
            f"Explain how a {thing} works.",
            f"Who is {name}?",
            f"What is a {thing}?",
            f"How do I {verb}?",
            f"Why do people {verb}?",
            f"Who made the first {thing}?",
            f"Write a program that can {verb}.",
            f"What do you think about {name}?",
            f"Translate {thing} into German.",
            f"Can you {verb} with a {animal}?",
            f"Where can I buy a {adjective} {thing}?",
            f"What is the meaning of {rng.choice(['life', 'love', 'time', verb])}?",
            f"How much does a {thing} cost?",
        ]
    )


def _system(rng: Random) -> Sequence[Message]:
    return [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < 0.2 else []


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}
