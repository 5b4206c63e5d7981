"""`/v1/completions`, compared with our own client's answers of the same engine."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.http_server.server import Server
from vibe_sgl_lite import SamplingParams

PROMPT = "Once upon a time"
GREEDY = SamplingParams(max_new_tokens=16, temperature=0)


def test_a_whole_answer_and_a_stream(server: Server, client: Any) -> None:
    with server.client() as ours:
        expected = ours.generate(PROMPT, GREEDY)
    answer = client.completions.create(model="tiny", prompt=PROMPT, temperature=0)  # 16 tokens is OpenAI's default
    assert answer.object == "text_completion"
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert expected.usage is not None
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    assert answer.usage.completion_tokens == 16
    # The client's types have no chunk without a finish reason, which OpenAI itself sends.
    lenient = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    chunks = list(
        lenient.completions.create(
            model="tiny", prompt=PROMPT, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 16


def test_prompts_of_every_kind(server: Server) -> None:
    with server.client() as ours:
        texts = [out.text for out in ours.generate([PROMPT, "2 + 2 ="], GREEDY)]
        ids = server.post("/v1/completions", {"prompt": PROMPT, "return_token_ids": True, "max_tokens": 1}).json[
            "choices"
        ][0]["prompt_token_ids"]
    for prompt, expected in (
        (PROMPT, texts[:1]),
        ([PROMPT, "2 + 2 ="], texts),
        (ids, texts[:1]),
        ([ids, ids], [texts[0]] * 2),
    ):
        answer = server.post("/v1/completions", {"prompt": prompt, "temperature": 0}).json
        assert [choice["text"] for choice in answer["choices"]] == expected
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))


def test_samples_of_several_prompts(server: Server) -> None:
    body = {"prompt": [PROMPT, "2 + 2 ="], "n": 2, "seed": 1, "temperature": 1.2, "max_tokens": 8, "echo": True}
    whole = server.post("/v1/completions", body).json
    texts = [choice["text"] for choice in whole["choices"]]
    assert [text.startswith(start) for text, start in zip(texts, [PROMPT] * 2 + ["2 + 2 ="] * 2, strict=True)] == [
        True
    ] * 4
    parts = [""] * 4
    for event in server.post("/v1/completions", body | {"stream": True}).events[:-1]:
        for choice in event["choices"]:
            parts[choice["index"]] += choice["text"]
    assert parts == texts
    assert whole["usage"]["prompt_tokens"] < 40  # each prompt once


def test_usage_counts_a_prompt_once_and_every_sample(server: Server) -> None:
    """Also what of a prompt was cached, and the same in a stream, which no proxy may hold back."""
    prompts = [f"{PROMPT} there were many, many numbers: {number * 11} and {number * 111}." for number in (1, 2)]
    alone = [server.post("/v1/completions", {"prompt": prompt, "max_tokens": 1}).json["usage"] for prompt in prompts]
    body = {"prompt": prompts, "max_tokens": 3, "ignore_eos": True, "n": 3}
    usage = server.post("/v1/completions", body).json["usage"]
    assert usage["prompt_tokens"] == sum(one["prompt_tokens"] for one in alone)
    assert usage["completion_tokens"] == 2 * 3 * 3
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    cached = sum((one["prompt_tokens"] - 1) // 16 * 16 for one in alone)  # whole pages
    assert usage["prompt_tokens_details"]["cached_tokens"] == cached > 0
    reply = server.post("/v1/completions", body | {"stream": True, "stream_options": {"include_usage": True}})
    assert reply.events[-2]["usage"] == usage
    assert (reply.headers["cache-control"], reply.headers["x-accel-buffering"]) == ("no-cache", "no")


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(server: Server, stream: bool) -> None:
    """As evaluation harnesses ask: the prompt's own logprobs, first token without one."""
    params = SamplingParams(max_new_tokens=2, temperature=0, top_logprobs=1, prompt_logprobs=True)
    with server.client() as ours:
        expected = ours.generate(PROMPT, params)
    assert expected.prompt_logprobs is not None
    assert expected.logprobs is not None
    body = {"prompt": PROMPT, "max_tokens": 2, "temperature": 0, "echo": True, "logprobs": 1, "stream": stream}
    reply = server.post("/v1/completions", body)
    choices = (
        [event["choices"][0] for event in reply.events[:-1] if event["choices"]] if stream else reply.json["choices"]
    )
    text = "".join(choice["text"] for choice in choices)
    assert text == PROMPT + expected.text
    found = {
        key: [value for choice in choices if choice["logprobs"] for value in choice["logprobs"][key]]
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    }
    assert "".join(found["tokens"]) == text
    assert found["token_logprobs"][0] is None
    given = [entry.logprob for entry in expected.prompt_logprobs if entry] + [e.logprob for e in expected.logprobs]
    assert found["token_logprobs"][1:] == pytest.approx(given, abs=0.05)
    assert all(text[o:].startswith(t) for o, t in zip(found["text_offset"], found["tokens"], strict=True))
    assert found["top_logprobs"][0] is None
    assert len(found["top_logprobs"][-1]) == 1


def test_echo_alone_generates_nothing(server: Server) -> None:
    body = {"prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = server.post("/v1/completions", body).json
    assert answer["choices"][0]["text"] == PROMPT
    assert answer["usage"]["completion_tokens"] == 0
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_alone_shows_no_id_and_no_end_of_what_is_not_shown(server: Server, stream: bool) -> None:
    """Whatever the token that is computed and not shown is: here an end token, by its bias."""
    end = server.post("/tokenize", {"prompt": "<|im_end|>"}).json["tokens"]
    body = {"prompt": PROMPT, "max_tokens": 0, "echo": True, "return_token_ids": True, "stream": stream}
    reply = server.post("/v1/completions", body | {"logit_bias": {end[0]: 1000}, "stop_token_ids": end})
    choices = [event["choices"][0] for event in reply.events[:-1]] if stream else reply.json["choices"]
    assert "".join(choice["text"] for choice in choices) == PROMPT
    assert [choice["token_ids"] for choice in choices if "token_ids" in choice] == [[]]
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("length", None)


@pytest.mark.parametrize("more", [{"echo": True}, {"return_token_ids": True}], ids=str)
@pytest.mark.parametrize("prompt", [[-1], [2**31], [10**30], [[5], [-1]], [99_999_999]], ids=str)
def test_ids_to_be_shown_again_are_checked_first(server: Server, prompt: list[Any], more: dict[str, bool]) -> None:
    reply = server.post("/v1/completions", {"prompt": prompt, "max_tokens": 1} | more)
    assert (reply.status, reply.json["error"]["code"]) == (400, "invalid_value"), reply.data


@pytest.mark.parametrize("logprobs", [0, 1, 3])
def test_the_token_that_came_is_among_the_top_ones(server: Server, logprobs: int) -> None:
    """As OpenAI's reference has it: up to one more than were asked for."""
    body = {"prompt": PROMPT, "max_tokens": 30, "temperature": 3, "seed": 4, "ignore_eos": True, "logprobs": logprobs}
    found = server.post("/v1/completions", body | {"echo": True}).json["choices"][0]["logprobs"]
    lists = (found["tokens"], found["token_logprobs"], found["top_logprobs"])
    for token, logprob, top in list(zip(*lists, strict=True))[1:]:
        assert len(top) <= logprobs + 1
        assert top[token] >= logprob  # another token may have the same text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_offsets_are_places_in_the_text(server: Server, echo: bool, stream: bool) -> None:
    """Also where a character is several tokens, of which none has a text of its own."""
    prompt = "你好, 世界! "
    params = SamplingParams(max_new_tokens=40, temperature=5, seed=3, ignore_eos=True, logprobs=True)
    with server.client() as ours:
        entries = ours.generate(prompt, params).logprobs
    assert entries is not None
    offsets = [entry.text_offset for entry in entries if entry.text_offset is not None]
    assert offsets[-1] < sum(len(entry.text) for entry in entries[:-1])  # else the seed is a bad one for this test
    body = {"prompt": prompt, "max_tokens": 40, "temperature": 5, "seed": 3, "ignore_eos": True, "logprobs": 0}
    reply = server.post("/v1/completions", body | {"echo": echo, "stream": stream})
    choices = [event["choices"][0] for event in reply.events[:-1]] if stream else reply.json["choices"]
    found = [offset for choice in choices if choice["logprobs"] for offset in choice["logprobs"]["text_offset"]]
    before = len(prompt) if echo else 0
    assert found[-40:] == [before + offset for offset in offsets]
    assert found == sorted(found)
    assert found[0] == 0


def test_ignore_eos_and_min_tokens(server: Server) -> None:
    body = {"prompt": PROMPT, "max_tokens": 300, "temperature": 0, "ignore_eos": True, "stop": None}
    assert server.post("/v1/completions", body).json["usage"]["completion_tokens"] == 300
