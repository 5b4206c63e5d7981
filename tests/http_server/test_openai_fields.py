"""Fields that chats and completions share, against our own client's answers with the parameter of the same meaning."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.http_server.server import Server
from vibe_sgl_lite import SamplingParams
from vibe_sgl_lite.http_server.openai_types import ChatBody, CompletionBody
from vibe_sgl_lite.http_server.requests import engine_options

PROMPT = "Once upon a time there was a dog. The dog"
QUESTION: Any = [{"role": "user", "content": "What is 17 + 25?"}]
BASE: dict[str, Any] = {"seed": 4, "temperature": 1.5, "max_tokens": 16}
OURS = SamplingParams(seed=4, temperature=1.5, max_new_tokens=16)
# a body's field -> ours; each changes what is said
FIELDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"seed": 6}, {"seed": 6}),
    ({"temperature": 0.2}, {"temperature": 0.2}),
    ({"top_p": 0.05}, {"top_p": 0.05}),
    ({"top_k": 1}, {"top_k": 1}),
    ({"min_p": 0.9}, {"min_p": 0.9}),
    ({"frequency_penalty": -2.0, "max_tokens": 60}, {"frequency_penalty": -2.0, "max_new_tokens": 60}),
    ({"presence_penalty": -2.0, "max_tokens": 60}, {"presence_penalty": -2.0, "max_new_tokens": 60}),
    ({"repetition_penalty": 0.3}, {"repetition_penalty": 0.3}),
    ({"logit_bias": {"40": 100}}, {"logit_bias": {40: 100.0}}),
    ({"stop": [" a", "e"]}, {"stop": [" a", "e"]}),
    ({"stop": "e", "include_stop_str_in_output": True}, {"stop": ["e"], "include_stop": True}),
    ({"max_tokens": 3}, {"max_new_tokens": 3}),
]


@pytest.mark.parametrize(("theirs", "ours"), FIELDS, ids=lambda value: "-".join(value))
def test_a_field_does_what_our_own_client_does_with_it(
    server: Server, theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    params = OURS.to_dict() | ours
    with server.client() as client:
        plain = client.generate(PROMPT, SamplingParams(**OURS.to_dict() | {"max_new_tokens": params["max_new_tokens"]}))
        completion = client.generate(PROMPT, SamplingParams(**params))
        chat = client.chat(QUESTION, SamplingParams(**params), enable_thinking=False)
    assert completion.text != plain.text or list(theirs) == ["max_tokens"], "nothing is shown by this"
    body = BASE | theirs
    assert server.post("/v1/completions", body | {"prompt": PROMPT}).json["choices"][0]["text"] == completion.text
    answer = server.post("/v1/chat/completions", body | {"messages": QUESTION, "reasoning_effort": "none"}).json
    assert answer["choices"][0]["message"]["content"] == chat.text


@pytest.mark.parametrize(
    "off",
    [{"reasoning_effort": "none"}, {"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}],
)
def test_no_thinking_by_each_of_its_names(server: Server, off: dict[str, Any]) -> None:
    body = {"messages": QUESTION, "temperature": 0}
    message = server.post("/v1/chat/completions", body | off).json["choices"][0]["message"]
    assert (message["content"], message.get("reasoning_content")) == ("42", None)
    assert server.post("/v1/chat/completions", body).json["choices"][0]["message"]["reasoning_content"]


def test_null_means_absent(server: Server) -> None:
    for path, kind, needed in (
        ("/v1/completions", CompletionBody, {"prompt": PROMPT}),
        ("/v1/chat/completions", ChatBody, {"messages": QUESTION}),
    ):
        nothing = dict.fromkeys(kind.__struct_fields__)
        texts = {
            str([choice.get("text", choice.get("message")) for choice in server.post(path, body).json["choices"]])
            for body in (BASE | needed, nothing | BASE | needed)
        }
        assert len(texts) == 1


def test_prefixes_are_shared_within_a_salt_alone(server: Server) -> None:
    def cached(salt: str | None) -> int:
        body = {"prompt": "A prefix of several pages. " * 20, "max_tokens": 1, "cache_salt": salt}
        usage = server.post("/v1/completions", body).json["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert [cached("one"), cached("two"), cached(None)] == [0, 0, 0]
    assert min(cached("one"), cached("two"), cached(None)) > 0


def test_the_last_message_goes_on(server: Server) -> None:
    turns = [*QUESTION, {"role": "assistant", "content": "The answer is"}]
    body = {"messages": turns, "continue_final_message": True, "add_generation_prompt": False, "return_token_ids": True}
    answer = server.post("/v1/chat/completions", body | BASE | {"temperature": 0}).json
    prompt = server.post("/detokenize", {"tokens": answer["prompt_token_ids"]}).json["prompt"]
    assert prompt.endswith("The answer is")
    goes_on = server.post("/generate", {"input_ids": answer["prompt_token_ids"], "sampling_params": {
        "temperature": 0, "max_new_tokens": 16}}).json  # fmt: skip
    assert answer["choices"][0]["token_ids"] == goes_on["output_ids"]


def test_the_engine_is_told_of_the_priority() -> None:
    assert engine_options(CompletionBody(prompt="x", priority=3)) == {"priority": 3}


def test_an_error_inside_a_stream_is_one_of_the_openai_client(server: Server, client: Any) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=20_000, extra_body={"ignore_eos": True}, stream=True
    )
    next(stream)
    assert server.post("/abort_request", {"abort_all": True}).status == 200
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "aborted"
