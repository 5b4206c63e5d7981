"""Thinking budgets and grammars of slots: what they allow next, and that replaying tokens gives the same state."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vibe_sgl_lite
from tests.model_worker.sampling.reference import make_sampler, sample
from tests.model_worker.sampling.test_sampler import random_row
from tests.runtime.text.test_grammar import make_grammar
from vibe_sgl_lite.model_worker.sampling import grammar as grammar_module
from vibe_sgl_lite.model_worker.sampling.constraints import Constraints
from vibe_sgl_lite.model_worker.sampling.grammar import Grammar, GrammarLibrary
from vibe_sgl_lite.model_worker.sampling.slot_constraint import SlotConstraint
from vibe_sgl_lite.qwen3.layers.parallel_state import Group
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling, SamplingParams, ThinkingRules, resolve
from vibe_sgl_lite.runtime.text.grammar import make_matcher
from vibe_sgl_lite.runtime.text.tokenizer import Tokenizer

FOLDER = Path(vibe_sgl_lite.__file__).parent / "models" / "tiny"
TOKENIZER = Tokenizer.from_file(FOLDER / "tokenizer.json")
VOCAB = 2048
END = 2041
OPEN, CLOSE = TOKENIZER.encode("<think>")[0], TOKENIZER.encode("</think>")[0]
CLOSING = tuple(TOKENIZER.encode("\n</think>\n\n"))
TAIL = CLOSING[CLOSING.index(CLOSE) + 1 :]
LIBRARY = GrammarLibrary(FOLDER / "tokenizer.json", VOCAB, (END, 2039))


def sampling(thinking: ThinkingRules | None = None, grammar: str | None = None) -> ResolvedSampling:
    resolved = resolve(
        SamplingParams(),
        model_defaults={},
        end_token_ids=(END, 2039),
        prompt_tokens=1,
        context_length=1000,
        vocab_size=VOCAB,
    )
    values: dict[str, Any] = {name: getattr(resolved, name) for name in resolved.__struct_fields__}
    return ResolvedSampling(**values | {"thinking": thinking, "grammar": grammar})


def rules(limit: int | None, *, inside: bool = False) -> ThinkingRules:
    return ThinkingRules(OPEN, CLOSE, inside, limit, CLOSING, TAIL)


def constraint(thinking: ThinkingRules | None, regex: str | None = None) -> SlotConstraint:
    text = make_grammar(None, regex, None)
    return SlotConstraint(sampling(thinking, text), None if text is None else Grammar(LIBRARY, text))


def allowed(slot: SlotConstraint) -> set[int] | None:
    """None: anything."""
    if slot.is_free:
        return None
    row = np.zeros(VOCAB, dtype=np.bool_)
    slot.fill(row)
    return set(np.flatnonzero(row).tolist())


def forced(slot: SlotConstraint) -> list[int]:
    """Draw while only one token may come."""
    drawn = []
    while (some := allowed(slot)) is not None and len(some) == 1:
        drawn.append(some.pop())
        slot.accept(drawn[-1])
    return drawn


def draw(slot: SlotConstraint, text: str) -> None:
    for token in TOKENIZER.encode(text):
        some = allowed(slot)
        assert some is None or token in some, f"{TOKENIZER.decode([token])!r} of {text!r}"
        slot.accept(token)


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_a_spent_budget_closes_the_block(limit: int) -> None:
    slot = constraint(rules(limit))
    assert allowed(slot) is None
    slot.accept(OPEN)
    for token in range(100, 100 + limit):
        assert allowed(slot) is None
        slot.accept(token)
    assert forced(slot) == list(CLOSING)
    assert allowed(slot) is None
    slot.accept(OPEN)  # no second block
    assert allowed(slot) is None


def test_a_budget_of_a_block_that_the_prompt_opened() -> None:
    slot = constraint(rules(2, inside=True))
    slot.accept(100)
    assert allowed(slot) is None
    slot.accept(101)
    assert forced(slot) == list(CLOSING)
    assert forced(constraint(rules(0, inside=True))) == list(CLOSING)


def test_a_block_that_closes_itself_is_left_alone() -> None:
    slot = constraint(rules(10))
    for token in (OPEN, 100, CLOSE, *range(100, 150)):
        assert allowed(slot) is None
        slot.accept(token)


def test_no_block_no_budget() -> None:
    slot = constraint(rules(2))
    for token in (100, OPEN, *range(100, 150)):
        assert allowed(slot) is None
        slot.accept(token)


def test_a_grammar_from_the_first_token() -> None:
    slot = constraint(None, "ab{2}c?")
    assert END not in (allowed(slot) or {END})
    draw(slot, "abb")
    end = allowed(slot)
    assert end is not None
    assert {END, 2039} < end  # or a c
    draw(slot, "c")
    assert allowed(slot) == {END, 2039}
    slot.accept(END)
    assert allowed(slot) is None  # what a step in flight still draws is thrown away


def test_a_grammar_holds_after_the_thinking_block() -> None:
    slot = constraint(rules(None), "ab")
    first = allowed(slot)
    assert first is not None
    assert OPEN in first
    assert CLOSE not in first
    slot.accept(OPEN)
    thinking = allowed(slot)
    assert thinking is not None
    assert thinking == set(range(VOCAB)) - {END, 2039}
    draw(slot, "free text 123")
    slot.accept(CLOSE)
    assert forced(slot)[: len(TAIL)] == list(TAIL)
    slot = constraint(rules(None), "ab")  # and without a block at once
    draw(slot, "ab")
    assert allowed(slot) == {END, 2039}
    slot = constraint(rules(1), "ab")
    slot.accept(OPEN)
    slot.accept(100)
    assert forced(slot)[: len(CLOSING)] == list(CLOSING)


def test_replayed_tokens_give_the_same_state() -> None:
    text = make_grammar('{"type": "array", "items": {"type": "integer"}, "maxItems": 4}', None, None)
    params = sampling(rules(3), text)
    chooser = random.Random(5)
    one = SlotConstraint(params, Grammar(LIBRARY, text or ""))
    drawn: list[int] = []
    for _ in range(30):
        again = SlotConstraint(params, Grammar(LIBRARY, text or ""))
        for token in drawn:
            again.accept(token)
        some = allowed(one)
        assert allowed(again) == some
        drawn.append(OPEN if not drawn else chooser.choice(sorted(some or range(50, 100))))
        one.accept(drawn[-1])


def test_a_step_masks_only_the_rows_that_ask() -> None:
    constraints = Constraints(VOCAB, slice(0, VOCAB), LIBRARY)
    grammar = make_grammar(None, None, ["cat", "dog"])
    constraints.admit(3, sampling(None, grammar), [])
    constraints.admit(4, sampling(), [])
    constraints.admit(5, sampling(rules(1)), [OPEN])
    slots = np.array([4, 5], np.int64)
    assert constraints.begin(constraints.of(slots)) is None
    drawn = [7, 100]
    for row, constraint in constraints.of(slots):
        constraint.accept(drawn[row])
    slots = np.array([4, 3, 5], np.int64)
    mask = constraints.begin(constraints.of(slots))
    assert mask is not None
    logits = torch.randn(3, VOCAB)
    plain = logits.clone()
    mask.apply(logits)
    assert torch.equal(logits[0], plain[0])
    texts = {TOKENIZER.decode([i]) for i in torch.isfinite(logits[1]).nonzero()[:, 0].tolist()}
    assert {"c", "d"} <= texts <= {"c", "ca", "cat", "d", "do", "dog"}
    assert torch.isfinite(logits[2]).nonzero().tolist() == [[CLOSING[0]]]
    assert mask.failed == []
    shard = Constraints(VOCAB, slice(1024, VOCAB), LIBRARY)
    shard.admit(3, sampling(None, grammar), [])
    part = shard.begin(shard.of(np.array([3], np.int64)))
    assert part is not None
    half = plain[1:2, 1024:].contiguous()
    part.apply(half)
    assert torch.equal(half[0], logits[1, 1024:])
    constraints.release(3)
    constraints.release(5)
    assert constraints.begin(constraints.of(slots)) is None


def test_a_grammar_that_goes_wrong_fails_its_row() -> None:
    """The sampler never draws what the mask forbids; if something does, the row fails and the rank goes on."""
    constraints = Constraints(VOCAB, slice(0, VOCAB), LIBRARY)
    constraints.admit(0, sampling(None, make_grammar(None, "ab", None)), [])
    slots = np.array([0], np.int64)
    [(_, constraint)] = constraints.of(slots)
    constraint.accept(TOKENIZER.encode("zzz")[0])
    mask = constraints.begin(constraints.of(slots))
    assert mask is not None
    mask.apply(torch.zeros(1, VOCAB))
    assert mask.failed == [0]


def test_a_panic_of_the_library_fails_its_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(self: Grammar, allowed: Any) -> None:
        raise BaseException("as the library's panics are")

    constraints = Constraints(VOCAB, slice(0, VOCAB), LIBRARY)
    for slot, text in enumerate(("ab", "cd")):
        constraints.admit(slot, sampling(None, make_grammar(None, text, None)), [])
    bad = constraints._slots[0].grammar
    assert bad is not None
    monkeypatch.setattr(bad, "fill", explode.__get__(bad))
    mask = constraints.begin(constraints.of(np.array([0, 1], np.int64)))
    assert mask is not None
    logits = torch.zeros(2, VOCAB)
    mask.apply(logits)
    assert mask.failed == [0]
    assert TOKENIZER.decode(torch.isfinite(logits[1]).nonzero()[:1, 0].tolist()) == "c"


def test_samples_share_one_compiled_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def counted(tokenizer: Any, grammar: str) -> Any:
        made.append(grammar)
        return make_matcher(tokenizer, grammar)

    monkeypatch.setattr(grammar_module, "make_matcher", counted)
    library = GrammarLibrary(FOLDER / "tokenizer.json", VOCAB, (END, 2039))
    constraints = Constraints(VOCAB, slice(0, VOCAB), library)
    text = make_grammar(None, "[a-z]{5}", None)
    for slot in range(64):
        constraints.admit(slot, sampling(None, text), [])
    constrained = constraints.of(np.arange(64))
    for _ in range(3):  # each goes its own way
        mask = constraints.begin(constrained)
        assert mask is not None
        logits = torch.rand(64, VOCAB)
        mask.apply(logits)
        assert mask.failed == []
        for (_, state), token in zip(constrained, logits.argmax(dim=1).tolist(), strict=True):
            state.accept(token)
    assert made == [text]


def test_a_json_document_can_always_be_finished() -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "n": {"enum": [1, 2, 30]},
        },
        "required": ["name", "n"],
        "additionalProperties": False,
    }
    text = make_grammar(json.dumps(schema), None, None)
    for seed in range(20):
        chooser = random.Random(seed)
        slot = SlotConstraint(sampling(None, text), Grammar(LIBRARY, text or ""))
        ids: list[int] = []
        while not ids or ids[-1] not in (END, 2039):
            ids.append(chooser.choice(sorted(allowed(slot) or ())))
            slot.accept(ids[-1])
            assert len(ids) < 80
        value = json.loads(TOKENIZER.decode(ids))
        assert set(value) == {"name", "n"}


@pytest.mark.parametrize("seed", range(3))
def test_masked_rows_draw_as_rows_of_these_tokens_alone(seed: int) -> None:
    """With every other setting on top: the draw is that of the same logits with -inf in them, others are untouched."""
    rng = random.Random(seed)
    rows = [random_row(rng, VOCAB, min_new_tokens=0) for _ in range(12)]
    constraints = Constraints(VOCAB, slice(0, VOCAB), LIBRARY)
    allowed_ids: dict[int, list[int]] = {}
    for place in range(0, len(rows), 2):
        regex = rng.choice(["a", "[a-z]+", ".*", "[0-9]{2}|yes"])
        constraints.admit(place, sampling(None, make_grammar(None, regex, None)), [])
        allowed_ids[place] = sorted(allowed(constraint(None, regex)) or ())
    slots = np.arange(len(rows))
    positions = np.array([row.position for row in rows])
    logits = torch.stack([row.logits for row in rows])
    mask = constraints.begin(constraints.of(slots))
    masked = make_sampler(rows).sample(logits.clone(), slots, positions, mask).token_ids.tolist()
    for place, ids in allowed_ids.items():
        assert masked[place] in ids
    free = make_sampler(rows).sample(logits.clone(), slots, positions).token_ids.tolist()
    assert masked[1::2] == free[1::2]
    for place, ids in allowed_ids.items():
        forbidden = torch.ones(VOCAB, dtype=torch.bool)
        forbidden[ids] = False
        row = replace(rows[place], logits=logits[place].masked_fill(forbidden, float("-inf")))
        assert sample([row]).tolist() == [masked[place]]


def test_an_exception_while_a_mask_is_made_fails_its_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that the grammar library cannot take, say; other rows are masked as ever, and the rank lives on."""
    broken = make_grammar(None, None, ["cat"])

    def fail(grammar: Grammar, allowed: object) -> None:
        if grammar._text == broken:
            raise ValueError("this tokenizer cannot be had")
        fill(grammar, allowed)  # type: ignore[arg-type]

    fill = Grammar.fill
    monkeypatch.setattr(Grammar, "fill", fail)
    constraints = Constraints(VOCAB, slice(0, VOCAB), LIBRARY)
    constraints.admit(0, sampling(None, broken), [])
    constraints.admit(1, sampling(None, make_grammar(None, None, ["dog"])), [])
    for _ in range(2):
        mask = constraints.begin(constraints.of(np.array([0, 1], np.int64)))
        assert mask is not None
        logits = torch.zeros(2, VOCAB)
        mask.apply(logits)
        assert mask.failed == [0]
        assert torch.isfinite(logits[0]).all()
        texts = {TOKENIZER.decode([i]) for i in torch.isfinite(logits[1]).nonzero()[:, 0].tolist()}
        assert texts
        assert texts <= {"d", "do", "dog"}


@pytest.mark.parametrize("limit", [None, 2, 6])
@pytest.mark.parametrize("regex", [None, "[a-z ]{2,40}", "the cat and the dog"])
def test_masks_behind_drafts_are_those_of_a_row_that_got_there(regex: str | None, limit: int | None) -> None:
    """As far as the drafts are allowed; what follows one that is not counts as late, and the row itself stays."""
    text = make_grammar(None, regex, None)
    constraints = Constraints(VOCAB, slice(0, VOCAB), LIBRARY)
    thinking = None if limit is None else rules(limit, inside=True)
    drafts = [*range(100, 103), *CLOSING] if limit is not None else []
    drafts += [*TOKENIZER.encode("the cat"), END, 7]
    constraints.admit(1, sampling(thinking, text), [])
    slots = np.array([0, *[1] * (1 + len(drafts)), 2], np.int64)
    constrained = constraints.of(slots)
    if text is None and limit is None:
        assert constrained == []
        return
    assert [place for place, _ in constrained] == [1]
    mask = constraints.begin(constrained, {1: drafts})
    if mask is None:
        there = constraint(thinking, regex)
        assert there.is_free
        for token in drafts:
            there.accept(token)
            assert there.is_free
        return
    forbidden = dict(zip(mask.rows, (future.result(30) for future in mask.forbidden), strict=True))
    mask.settle(Group(), 30.0, alone=True)
    held = True
    for place in range(len(drafts) + 1):
        there = constraint(thinking, regex)
        for token in drafts[:place]:
            there.accept(token)
        some = allowed(there) if held else set[int]()
        found = forbidden.get(1 + place)
        if held and (text is None or not there.is_free):
            assert (None if found is None else {*np.flatnonzero(~found).tolist()}) == some
            assert 1 + place not in mask.late
        elif text is not None:
            assert found is None
            assert 1 + place in mask.late
        if place < len(drafts):
            held = held and (some is None or drafts[place] in some)
    assert allowed(constrained[0][1]) == allowed(constraint(thinking, regex))
