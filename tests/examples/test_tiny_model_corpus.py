"""The synthetic corpus: the same everywhere, right in every answer, and never a held-out item in training."""

import itertools
import json
import re
from collections import Counter
from random import Random

import pytest
from tokenizers import Tokenizer

from examples.tiny_model import chat
from examples.tiny_model.corpus import document, long_document, lookup_drill, pack, text_of
from examples.tiny_model.prompts import CLOSED_TASKS, HARD_TASKS, answer_of, closed_answer_prompts, with_shared_prefix
from examples.tiny_model.stories import article, draw_cast, story
from examples.tiny_model.tasks import TASK_WEIGHTS, TASKS, Question, draw, held_out
from tests.examples.tiny_model_paths import DENSE


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DENSE / "tokenizer.json"))


def training_texts(seed: int, count: int) -> list[str]:
    rng = Random(seed)
    short = [text_of(document(rng)) for _ in range(count)]
    return short + [text_of(long_document(rng, rng.randint(200, 3000))) for _ in range(count // 100)]


def user_turns(texts: list[str]) -> list[str]:
    return [turn for text in texts for turn in re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", text, re.DOTALL)]


def expected_answer(question: Question) -> str:
    """The answer worked out from the question's text alone, by other means than the generator's."""
    text, numbers = question.text, [int(number) for number in re.findall(r"-?\d+", question.text.replace("-", " - "))]
    match question.task:
        case "add" | "add_large":
            return str(sum(numbers))
        case "sub" | "sub_large":
            return str(numbers[1] - numbers[0] if "less than" in text else numbers[0] - numbers[1])
        case "after":
            return str(numbers[0] + 1)
        case "sort":
            return " ".join(map(str, sorted(numbers)))
        case "sort_down":
            return " ".join(map(str, sorted(numbers)[::-1]))
        case "largest":
            return str(sorted(numbers)[-1])
        case "smallest":
            return str(sorted(numbers)[0])
        case "copy" | "copy_letters" | "copy_unicode":
            return text.split(": ", 1)[1]
        case "reverse":
            return " ".join(reversed(text.removeprefix("Reverse: ").split(" ")))
        case "lookup":
            listed, key = re.fullmatch(r"(.*?)\.?\s+What is (\w+)\?", text, re.DOTALL).groups()  # type: ignore[union-attr]
            return dict(pair.split(": ") for pair in re.split(r", |\n", listed))[key]
        case "recall":
            return re.match(r"Remember the word (\w+)\.", text).group(1)  # type: ignore[union-attr]
        case "json":
            pairs = [pair.split(" ") for pair in text.split(": ", 1)[1].split(", ")]
            return json.dumps({key: int(value) if key == "age" else value for key, value in pairs})
    raise AssertionError(question.task)


@pytest.mark.parametrize("task", sorted(TASKS))
@pytest.mark.parametrize("held", [False, True])
def test_every_answer_is_right_and_its_item_on_the_asked_side(task: str, held: bool) -> None:
    rng = Random(f"{task}{held}")
    for _ in range(200):
        question = draw(task, rng, held=held)
        assert question.task == task
        assert held_out(task, question.item) == held
        assert question.answer == expected_answer(question), question


def test_column_working_ends_in_the_answer() -> None:
    rng = Random(3)
    for _ in range(500):
        question = draw(rng.choice(["add", "add_large"]), rng, held=False)
        totals = [int(total) for total in re.findall(r"make (\d+)\.", question.thinking)]
        worked = "".join(str(total % 10) for total in reversed(totals))
        assert int(("1" if totals[-1] > 9 else "") + worked) == int(question.answer), question
        question = draw(rng.choice(["sub", "sub_large"]), rng, held=False)
        digits = re.findall(r"minus \d is (\d)\.", question.thinking)
        assert int("".join(reversed(digits))) == abs(int(question.answer)), question


def test_held_out_is_about_a_tenth_and_the_rule_that_is_documented() -> None:
    pairs = list(itertools.product(range(100), repeat=2))
    assert [pair for pair in pairs if held_out("add", pair)] == [(x, y) for x, y in pairs if (100 * x + y) % 10 == 0]
    assert sum(held_out("sub", pair) for pair in pairs) == 500
    share = sum(held_out("sort", pair) for pair in pairs) / len(pairs)
    assert 0.08 < share < 0.12


def test_no_held_out_item_is_ever_trained() -> None:
    """Reads the training text itself, not the generator's idea of it."""
    turns = user_turns(training_texts(seed=11, count=12_000))
    seen: Counter[str] = Counter()

    def check(task: str, item: tuple[int | str, ...]) -> None:
        seen[task] += 1
        assert not held_out(task, item), (task, item)

    for turn in turns:
        if sums := re.search(r"(\d+) ?(?:\+|plus) ?(\d+)", turn):
            check("add", (int(sums[1]), int(sums[2])))
        elif more := re.search(r"(\d+) more than (\d+)", turn):
            check("add", (int(more[2]), int(more[1])))
        elif differences := re.search(r"(\d+) (?:-|minus) (\d+)", turn):
            check("sub", (int(differences[1]), int(differences[2])))
        elif less := re.search(r"(\d+) less than (\d+)", turn):
            check("sub", (int(less[2]), int(less[1])))
        elif ordered := re.fullmatch(r"(?:Sort|Sort these numbers|Sort from small to large): ([\d ]+)", turn):
            check("sort", tuple(map(int, ordered[1].split())))
        elif reverse := re.fullmatch(r"Reverse: (.*)", turn):
            check("reverse", tuple(reverse[1].split(" ")))
        elif lookup := re.fullmatch(r"((?:\w+: \w+(?:, |\n|\. ))+)What is (\w+)\?", turn):
            check("lookup", (*re.findall(r"\w+: \w+", lookup[1]), lookup[2]))
        elif "Remember" not in turn and (copied := re.fullmatch(r"(?:Copy|Repeat[ \w]*|Say this again): (.*)", turn)):
            words = tuple(copied[1].split(" "))
            kinds = ("copy", "copy_letters", "copy_unicode")
            seen["copy"] += 1
            assert not all(held_out(kind, words) for kind in kinds)
    assert min(seen[task] for task in ("add", "sub", "sort", "reverse", "lookup", "copy")) > 300, seen


def test_drills_leave_held_out_look_ups_out() -> None:
    rng = Random(5)
    asked = 0
    for _ in range(500):
        listed, _, rest = text_of(lookup_drill(rng)).removesuffix("<|endoftext|>").partition(". ")
        pairs = re.findall(r"\w+: \w+", listed)
        for key, value in re.findall(r"(\w+)[:?] (\w+)", rest):
            assert f"{key}: {value}" in pairs
            assert not held_out("lookup", (*pairs, key))
            asked += 1
    assert asked > 1000


def test_the_same_seed_gives_the_same_rows(tokenizer: Tokenizer) -> None:
    first, again, other = (pack(tokenizer, seed, 6, 1024) for seed in ("a", "a", "b"))
    assert first == again
    assert first.ids != other.ids
    assert len(first.ids) == len(first.weights) == 6 * 1024


def test_loss_covers_the_answer_and_nothing_the_user_says(tokenizer: Tokenizer) -> None:
    rows = pack(tokenizer, "c", 20, 256)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    user = vocabulary["user"]
    begin, end = vocabulary["<|im_start|>"], vocabulary["<|im_end|>"]
    in_user_turn, ends_with_loss = False, 0
    for index, (token, weight) in enumerate(zip(rows.ids, rows.weights, strict=True)):
        if index % 256 == 0:
            in_user_turn = False
        if token == begin:
            in_user_turn = index + 1 < len(rows.ids) and rows.ids[index + 1] == user
        if in_user_turn:
            assert weight == 0.0
        elif token == end and weight == 1.0:
            ends_with_loss += 1
    assert ends_with_loss > 20


def test_token_borders_never_cross_segments(tokenizer: Tokenizer) -> None:
    rng = Random(2)
    for _ in range(1000):
        segments = document(rng)
        parts = [token for part in segments for token in tokenizer.encode(part.text, add_special_tokens=False).ids]
        assert parts == tokenizer.encode(text_of(segments), add_special_tokens=False).ids


def test_long_documents_grow_with_the_request(tokenizer: Tokenizer) -> None:
    rng = Random(7)
    for asked in (1000, 4000):
        sizes = [len(tokenizer.encode(text_of(long_document(rng, asked))).ids) for _ in range(20)]
        assert asked / 4 < sum(sizes) / len(sizes) < asked * 2


def test_stories_keep_their_cast() -> None:
    rng = Random(4)
    for _ in range(200):
        cast = draw_cast(rng, kind="fox")
        text = story(rng, cast)
        assert cast.hero in text
        assert "fox" in text
        assert cast.hero != cast.friend
        assert cast.friend_kind != "fox"
    assert draw_cast(rng, name="Mia").hero == "Mia"
    assert article("owl") == "an owl"
    assert article("cat") == "a cat"


def test_prompts_are_held_out_deterministic_and_plain_messages() -> None:
    prompts = closed_answer_prompts(400, seed=1)
    assert prompts == closed_answer_prompts(400, seed=1)
    assert prompts != closed_answer_prompts(400, seed=2)
    assert {prompt.task for prompt in prompts} == set(CLOSED_TASKS)
    for prompt in prompts:
        assert prompt.messages[-1]["role"] in ("user", "tool")
        assert all(set(message) == {"role", "content"} for message in prompt.messages)
        text = prompt.messages[-1]["content"]
        if prompt.task == "add":
            x, y = map(int, re.findall(r"\d+", text))
            assert held_out("add", (y, x) if "more than" in text else (x, y))
        if prompt.task == "sub":
            assert int(prompt.expected) >= 0
        if prompt.task in ("sort", "sort_down"):
            assert len(set(prompt.expected.split())) == len(prompt.expected.split())


def test_hard_prompts_are_what_their_names_say() -> None:
    for prompt in closed_answer_prompts(200, seed=1, tasks=HARD_TASKS):
        if prompt.task == "sub_negative":
            assert prompt.expected.startswith("-")
        if prompt.task == "sort_repeated":
            assert len(set(prompt.expected.split())) < len(prompt.expected.split())
        if prompt.task == "tool_answer":
            assert prompt.messages[-1]["role"] == "tool"


def test_a_shared_prefix_keeps_every_prompts_own_messages() -> None:
    prompts = closed_answer_prompts(60, seed=1)
    prefixed = with_shared_prefix(prompts, stories=3, seed=0)
    starts = {prompt.messages[0]["content"][:600] for prompt in prefixed}
    assert len(starts) == 1
    for before, after in zip(prompts, prefixed, strict=True):
        assert after.expected == before.expected
        assert after.messages[-1] == before.messages[-1]
        if before.messages[0]["role"] == "system":
            assert after.messages[0]["content"].endswith("\n\n" + before.messages[0]["content"])
            assert after.messages[1:] == before.messages[1:]
        else:
            assert after.messages[1:] == before.messages


def test_answer_of_drops_the_thinking_block() -> None:
    assert answer_of("<think>\nOnes: 7 and 5 make 12.\n</think>\n\n42") == "42"
    assert answer_of("42") == "42"


def test_tool_calls_are_json_that_names_an_offered_tool() -> None:
    rng = Random(6)
    calls = 0
    for _ in range(200):
        dialogue = chat.tool_use(rng, held=True)
        offered = [tool["function"]["name"] for tool in dialogue.tools]
        if dialogue.task == "tool_call":
            call = json.loads(dialogue.answer.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
            assert call["name"] in offered
            calls += 1
    assert calls > 50


def test_every_task_has_a_weight() -> None:
    assert set(TASK_WEIGHTS) == set(TASKS)
