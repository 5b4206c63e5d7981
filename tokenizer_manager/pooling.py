"""Requests for what a prompt gives without new tokens: what does not go with them, and what they run with."""

from __future__ import annotations

import msgspec

from vibe_sgl_lite.runtime.errors import ContextLengthError, RequestError
from vibe_sgl_lite.runtime.launcher.child import PipelineSpec
from vibe_sgl_lite.runtime.messages import Generate
from vibe_sgl_lite.runtime.settings.sampling_params import Pooling, ResolvedSampling, SamplingParams, resolve
from vibe_sgl_lite.runtime.text.chat_tokenizer import ChatTokenizer
from vibe_sgl_lite.runtime.text.grammar import FIELDS as GRAMMAR_FIELDS

# What Qwen3-Reranker was trained on, from its model card: a chat whose answer is one of LABELS.
LABELS = ("yes", "no")
PAIR = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {}\n<Query>: {}\n<Document>: {}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
ALLOWED = {"timeout_s", "seed"}  # of the sampling parameters; a request that is sent again has its seed


def is_pooled(message: Generate) -> bool:
    return message.dimensions is not None or message.pair is not None


def check_pooling(message: Generate, params: SamplingParams) -> SamplingParams:
    """What such a request samples with, which is never looked at. Raises RequestError naming the field."""
    if message.pair is not None and len(message.pair) != 3:
        raise RequestError("pair must hold three texts: instruction, query and document", field="pair")
    if message.dimensions is not None and message.pair is not None:
        raise RequestError("a pair has no dimensions; leave them out", field="dimensions")
    others = [name for name in ("messages", "resume_ids", *GRAMMAR_FIELDS) if getattr(message, name) is not None]
    for name in (*others, *(params.to_dict().keys() - ALLOWED)):
        raise RequestError(f"{name} does not go with an embedding or a score; leave it out", field=name)
    return SamplingParams(max_new_tokens=1, temperature=0, seed=0, timeout_s=params.timeout_s)


def resolve_pooling(
    request: Generate, params: SamplingParams, num_tokens: int, tokenizer: ChatTokenizer, spec: PipelineSpec
) -> ResolvedSampling:
    """params: what `check_pooling` returned. Raises RequestError naming the field."""
    if num_tokens > spec.context_length:
        raise ContextLengthError(
            f"the prompt has {num_tokens} tokens, the context length is {spec.context_length}: shorten it or raise "
            "--context-length",
            field="prompt",
        )
    hidden_size, labels = spec.model.hidden_size, []
    if (request.dimensions or 0) > hidden_size:
        raise RequestError(
            f"dimensions={request.dimensions}: must be 1 to {hidden_size}, as many as this model has",
            field="dimensions",
        )
    if request.pair is not None:
        if not spec.model.has_head:
            raise RequestError(f"{spec.model_name} has no lm_head: it makes embeddings and no scores", field="pair")
        for label in LABELS:
            token_id = tokenizer.token_id(label)
            if token_id is None or token_id >= spec.model.vocab_size:
                raise RequestError(
                    f"{label!r} is no token of {spec.model_name}, so it cannot score: use a Qwen3-Reranker",
                    field="pair",
                )
            labels.append(token_id)
    sampling = resolve(
        params,
        model_defaults={},
        end_token_ids=(),
        prompt_tokens=num_tokens,
        context_length=num_tokens + 1,  # the one token that is not made
        vocab_size=spec.model.vocab_size,
    )
    return msgspec.structs.replace(sampling, pooling=Pooling(request.dimensions or hidden_size, tuple(labels)))
