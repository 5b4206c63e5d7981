"""Closed-answer prompts that training never saw, for evaluation and the test-suite. Needs neither torch nor a model."""

from random import Random
from typing import NamedTuple

from examples.tiny_model import chat
from examples.tiny_model.stories import story
from examples.tiny_model.tasks import Question, draw
from examples.tiny_model.template import Message, tools_as_system_message

CLOSED_TASKS = (
    "add",
    "sub",
    "sort",
    "sort_down",
    "largest",
    "smallest",
    "copy",
    "reverse",
    "lookup",
    "recall",
    "json",
    "turns",
    "own_name",
    "tool_call",
)
"""Tasks that the trained models answer right nearly always, so that any deviation points at the engine.

Sums and differences are of numbers below 100, differences not below zero, lists without repetitions.
"""

HARD_TASKS = (
    "sub_negative",
    "add_large",
    "sub_large",
    "after",
    "sort_repeated",
    "copy_letters",
    "copy_unicode",
    "tool_answer",
)
"""Tasks worth measuring that are not promised."""

_ONE_TURN = {"sub_negative": "sub", "sort_repeated": "sort"}


class ClosedPrompt(NamedTuple):
    """`expected` is the whole right answer, after the thinking block if there is one."""

    task: str
    messages: list[Message]
    expected: str


def closed_answer_prompts(n: int, seed: int, tasks: tuple[str, ...] = CLOSED_TASKS) -> list[ClosedPrompt]:
    """`n` held-out prompts, the tasks in turn; the same for the same arguments.

    Tools are written into a system message, so that every prompt is plain messages.
    """
    rng = Random(f"closed:{seed}")
    return [_prompt(tasks[index % len(tasks)], rng) for index in range(n)]


def with_shared_prefix(prompts: list[ClosedPrompt], stories: int, seed: int) -> list[ClosedPrompt]:
    """The same prompts, all after one system message of `stories` stories, about 110 tokens each.

    What a prefix cache shares between them; a prompt's own system message follows the stories.
    """
    rng = Random(f"prefix:{seed}")
    library = "\n\n".join(story(rng) for _ in range(stories))
    shared = f"You are a helpful assistant. You know these stories.\n\n{library}"
    prefixed = []
    for prompt in prompts:
        own, rest = "", prompt.messages
        if rest[0]["role"] == "system":
            own, rest = f"\n\n{rest[0]['content']}", rest[1:]
        prefixed.append(prompt._replace(messages=[{"role": "system", "content": shared + own}, *rest]))
    return prefixed


def answer_of(text: str) -> str:
    """The answer in a model's text: what follows the thinking block, or all of it without one."""
    return text.rsplit("</think>", 1)[-1].strip("\n")


def _prompt(task: str, rng: Random) -> ClosedPrompt:
    if task in ("tool_call", "tool_answer"):
        while (dialogue := chat.tool_use(rng, held=True)).task != task:
            pass
        messages = [tools_as_system_message(dialogue.tools), *dialogue.messages]
        return ClosedPrompt(task, messages, dialogue.answer)
    if task == "own_name":
        dialogue = chat.own_name(rng, held=True)
    elif task == "turns":
        last = _question(rng.choice(["add", "sub", "sort", "copy", "lookup"]), rng)
        dialogue = chat.turns(rng, last, earlier=rng.randint(1, 4))
    else:
        dialogue = chat.ask(_question(task, rng), rng)
    return ClosedPrompt(task, list(dialogue.messages), dialogue.answer)


def _question(task: str, rng: Random) -> Question:
    """A held-out question that is one of `task` and not of its harder or easier neighbour."""
    while True:
        question = draw(_ONE_TURN.get(task, task), rng, held=True)
        negative = question.task == "sub" and question.answer.startswith("-")
        repeated = question.task.startswith("sort") and len(set(question.item)) < len(question.item)
        if negative == (task == "sub_negative") and repeated == (task == "sort_repeated"):
            return question
