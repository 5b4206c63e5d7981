"""Questions with exactly one right answer, and the rule that keeps some of them out of training.

Each task draws a `Question`: its text, the working that goes into a thinking block, the answer, and the `item` that
`held_out` decides on. Knows nothing about chat format, documents or tokens.
"""

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from examples.tiny_model.stories import story
from examples.tiny_model.words import (
    ACCENTED,
    ANIMALS,
    CITIES,
    COLOURS,
    CYRILLIC,
    EMOJI,
    EVERYDAY,
    GREEK,
    HAN,
    KANA,
    NAMES,
)

Item = tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """One question. `thinking` is the text of the thinking block, without tags and line breaks around it."""

    task: str
    item: Item
    text: str
    thinking: str
    answer: str


def held_out(task: str, item: Item) -> bool:
    """Whether training never sees this item, about one in ten.

    - Sums x + y, whatever their size and wording ("y more than x" is x + y): (100 x + y) % 10 == 0.
    - Differences x - y: (x + 3 y) % 10 == 0 where, besides, the numbers without their last digits add up to an even
      number: every pair of last digits is trained, though not with every pair of numbers.
    - Every other task: CRC-32 of the task's name and the item's parts, joined by the unit separator, % 10 == 0.
    """
    if task in ("add", "add_large"):
        x, y = map(int, item)
        return (100 * x + y) % 10 == 0
    if task in ("sub", "sub_large"):
        x, y = map(int, item)
        return (x + 3 * y) % 10 == 0 and (x // 10 + y // 10) % 2 == 0
    return zlib.crc32("\x1f".join(map(str, (task, *item))).encode()) % 10 == 0


def draw(task: str, rng: Random, *, held: bool) -> Question:
    """A random question of `task` from its held-out items (`held`) or from its trainable ones.

    Raises KeyError for a task that does not exist.
    """
    make = TASKS[task]
    while True:
        question = make(rng)
        assert question.task == task
        if held_out(task, question.item) == held:
            return question


# Arithmetic ------------------------------------------------------------------------------------------------------


def _number(rng: Random, large: bool) -> int:
    if large:
        number = rng.randint(100, 999) if rng.random() < 0.8 else rng.randint(0, 99)
        # More zeros in the middle than chance gives: the held-out sums are those with zeros at the end.
        return number - number % 100 + number % 10 if rng.random() < 0.2 else number
    return rng.randint(0, 9) if rng.random() < 0.15 else rng.randint(0, 99)


_PLACES = ("Ones", "Tens", "Hundreds", "Thousands")


def _digits(number: int, places: int) -> list[int]:
    return [number // 10**place % 10 for place in range(places)]


def _add_thinking(first: int, second: int) -> str:
    """Column addition, the ones first."""
    places = max(2, len(str(first)), len(str(second)))
    carry, steps = 0, []
    for name, a, b in zip(_PLACES, _digits(first, places), _digits(second, places), strict=False):
        total = a + b + carry
        steps.append(f"{name}: {a} and {b}{' and 1' if carry else ''} make {total}.")
        carry = total // 10
    return " ".join(steps)


def _sub_thinking(x: int, y: int) -> str:
    """Column subtraction of the smaller from the larger, the ones first."""
    lead = f"{x} is less than {y}, so the answer is below zero. " if x < y else ""
    high, low = max(x, y), min(x, y)
    places = max(2, len(str(high)))
    borrow, steps = 0, []
    for name, a, b in zip(_PLACES, _digits(high, places), _digits(low, places), strict=False):
        top = a - borrow
        taken = f"{a} less 1 is {top}, " if borrow else ""
        borrow = int(top < b)
        lent = f"add 10, {top + 10} " if borrow else f"{top} "
        steps.append(f"{name}: {taken}{lent}minus {b} is {top + 10 * borrow - b}.")
    return lead + " ".join(steps)


def _addition(large: bool) -> Callable[[Random], Question]:
    def make(rng: Random) -> Question:
        x, y = _number(rng, large), _number(rng, large)
        wording = rng.random()
        first, second = x, y
        if wording < 0.55:
            text = f"What is {x} + {y}?"
        elif wording < 0.65:
            text = f"What is {x} plus {y}?"
        elif wording < 0.72:
            text = f"{x} + {y} = ?"
        elif wording < 0.79:
            text = f"Calculate {x} + {y}."
        elif wording < 0.84:
            text = f"{x}+{y}"
        else:
            text, first, second = f"What is {y} more than {x}?", y, x
        return Question("add_large" if large else "add", (x, y), text, _add_thinking(first, second), str(x + y))

    return make


def _subtraction(large: bool) -> Callable[[Random], Question]:
    def make(rng: Random) -> Question:
        x, y = _number(rng, large), _number(rng, large)
        if x < y and rng.random() < 0.6:
            x, y = y, x
        wording = rng.random()
        if wording < 0.6:
            text = f"What is {x} - {y}?"
        elif wording < 0.72:
            text = f"What is {x} minus {y}?"
        elif wording < 0.8:
            text = f"{x} - {y} = ?"
        elif wording < 0.88:
            text = f"Calculate {x} - {y}."
        else:
            text = f"What is {y} less than {x}?"
        return Question("sub_large" if large else "sub", (x, y), text, _sub_thinking(x, y), str(x - y))

    return make


def _after(rng: Random) -> Question:
    number = rng.randint(0, 998) if rng.random() < 0.7 else rng.randint(0, 99)
    return Question(
        "after", (number,), f"What number comes after {number}?", f"After {number} comes one more.", str(number + 1)
    )


# Lists of numbers ------------------------------------------------------------------------------------------------


def _numbers(rng: Random, longest: int) -> list[int]:
    """2 to `longest` numbers below 10, below 100, or of both lengths; in one list of ten with repetitions."""
    size = rng.randint(2, longest)
    kind = rng.random()
    if kind < 0.4:
        pool = list(range(10))
    elif kind < 0.75:
        pool = list(range(100))
    else:
        pool = [*rng.sample(range(10), 5), *rng.sample(range(10, 100), 10)]
    return rng.choices(pool, k=size) if rng.random() < 0.1 else rng.sample(pool, size)


def _join(items: list[int] | list[str], separator: str = " ") -> str:
    return separator.join(map(str, items))


def _sorting(descending: bool) -> Callable[[Random], Question]:
    def make(rng: Random) -> Question:
        numbers = _numbers(rng, 8)
        ordered = sorted(numbers, reverse=descending)
        if descending:
            lead = rng.choice(["Sort from large to small:", "Sort in descending order:"])
        else:
            lead = "Sort:" if rng.random() < 0.7 else rng.choice(["Sort these numbers:", "Sort from small to large:"])
        thinking = f"In order: {_join(ordered, ', then ')}."
        task = "sort_down" if descending else "sort"
        return Question(task, tuple(numbers), f"{lead} {_join(numbers)}", thinking, _join(ordered))

    return make


def _extreme(largest: bool) -> Callable[[Random], Question]:
    def make(rng: Random) -> Question:
        numbers = _numbers(rng, 6)
        pick = max if largest else min
        lead = rng.choice(
            ["Largest:", "What is the largest of"] if largest else ["Smallest:", "What is the smallest of"]
        )
        text = f"{lead} {_join(numbers)}" + ("?" if lead.startswith("What") else "")
        so_far = [pick(numbers[: end + 1]) for end in range(len(numbers))]
        task = "largest" if largest else "smallest"
        return Question(task, tuple(numbers), text, f"So far: {_join(so_far, ', ')}.", str(pick(numbers)))

    return make


# Copying ---------------------------------------------------------------------------------------------------------


def _repeat(task: str, rng: Random, words: list[str]) -> Question:
    body = " ".join(words)
    lead = "Repeat:" if rng.random() < 0.75 else rng.choice(["Say this again:", "Copy:", "Repeat after me:"])
    return Question(task, tuple(words), f"{lead} {body}", f"The text is: {body}", body)


def _copy(rng: Random) -> Question:
    return _repeat("copy", rng, rng.sample(EVERYDAY, rng.randint(1, 10)))


def _copy_letters(rng: Random) -> Question:
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 6))) for _ in range(rng.randint(1, 5))]
    if rng.random() < 0.3:
        words = [word.capitalize() if rng.random() < 0.5 else str(rng.randint(0, 999)) for word in words]
    return _repeat("copy_letters", rng, words)


def _copy_unicode(rng: Random) -> Question:
    pools: list[str] = [HAN, KANA, CYRILLIC, GREEK, ACCENTED]
    words = []
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.5:
            words.append("".join(rng.choices(EMOJI, k=rng.randint(1, 3))))
        else:
            words.append("".join(rng.sample(rng.choice(pools), rng.randint(2, 5))))
    return _repeat("copy_unicode", rng, words)


def _reverse(rng: Random) -> Question:
    words = rng.sample(EVERYDAY, rng.randint(2, 6))
    back = words[::-1]
    return Question(
        "reverse",
        tuple(words),
        f"Reverse: {_join(words)}",
        f"From the end: {_join(back, ', then ')}.",
        _join(back),
    )


# Looking things up -----------------------------------------------------------------------------------------------


def draw_list(rng: Random, longest: int) -> tuple[list[str], list[str]]:
    """2 to `longest` different words and a value for each: numbers below 100, or colours."""
    keys = rng.sample(EVERYDAY, rng.randint(2, longest))
    if rng.random() < 0.75:
        return keys, [str(rng.randint(0, 9 if rng.random() < 0.5 else 99)) for _ in keys]
    return keys, rng.choices(COLOURS, k=len(keys))


def lookup_question(rng: Random, keys: list[str], values: list[str], chosen: int) -> Question:
    """The question for the value of `keys[chosen]` after the whole list, on one line or on several."""
    pairs = [f"{key}: {value}" for key, value in zip(keys, values, strict=True)]
    body = ", ".join(pairs) + ". " if rng.random() < 0.7 else "\n".join(pairs) + "\n"
    key, value = keys[chosen], values[chosen]
    return Question("lookup", (*pairs, key), f"{body}What is {key}?", f"The list says {key}: {value}.", value)


def _lookup(rng: Random) -> Question:
    keys, values = draw_list(rng, 8)
    return lookup_question(rng, keys, values, rng.randrange(len(keys)))


def recall(rng: Random, stories: int) -> Question:
    """A word to remember, `stories` whole stories, then the question for the word."""
    word = rng.choice(EVERYDAY)
    filler = "\n\n".join(story(rng) for _ in range(stories))
    text = f"Remember the word {word}.\n\n{filler}\n\nWhich word should you remember?"
    return Question("recall", (word, zlib.crc32(filler.encode())), text, f"The word was {word}.", word)


def _recall(rng: Random) -> Question:
    return recall(rng, 1)


def _json(rng: Random) -> Question:
    fields: dict[str, int | str] = {
        "name": rng.choice(NAMES),
        "age": rng.randint(1, 99),
        "city": rng.choice(CITIES),
        "colour": rng.choice(COLOURS),
        "pet": rng.choice(ANIMALS),
    }
    keys = rng.sample(sorted(fields), rng.randint(1, 4))
    record = {key: fields[key] for key in keys}
    listed = ", ".join(f"{key} {value}" for key, value in record.items())
    lead = rng.choice(["Write JSON:", "Write JSON:", "As JSON:"])
    item = tuple(part for pair in record.items() for part in pair)
    return Question("json", item, f"{lead} {listed}", f"The fields are {', '.join(keys)}.", json.dumps(record))


TASKS: dict[str, Callable[[Random], Question]] = {
    "add": _addition(large=False),
    "sub": _subtraction(large=False),
    "add_large": _addition(large=True),
    "sub_large": _subtraction(large=True),
    "after": _after,
    "sort": _sorting(descending=False),
    "sort_down": _sorting(descending=True),
    "largest": _extreme(largest=True),
    "smallest": _extreme(largest=False),
    "copy": _copy,
    "copy_letters": _copy_letters,
    "copy_unicode": _copy_unicode,
    "reverse": _reverse,
    "lookup": _lookup,
    "recall": _recall,
    "json": _json,
}
"""Every closed-answer task by name: what makes one random question of it, held out or not."""

TASK_WEIGHTS: dict[str, float] = {
    "add": 5.0,
    "sub": 5.0,
    "add_large": 2.5,
    "sub_large": 2.5,
    "after": 0.4,
    "sort": 3.0,
    "sort_down": 1.5,
    "largest": 1.2,
    "smallest": 1.2,
    "copy": 1.5,
    "copy_letters": 1.2,
    "copy_unicode": 1.0,
    "reverse": 1.2,
    "lookup": 6.0,
    "recall": 0.4,
    "json": 0.8,
}
"""How often training draws each task, relative to the others."""
