"""What schemathesis makes of `/openapi.json`: bodies and methods at the edges of the document and beyond them, and
answers that have to be as it tells."""

from __future__ import annotations

from typing import Any, TypeAlias

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import positive_data_acceptance
from schemathesis.specs.openapi.schemas import OpenApiSchema

from tests.http_server.server import Server
from vibe_sgl_lite.http_server import openapi

AnyCase: TypeAlias = schemathesis.Case[Any]
LENGTHS = {"max_tokens", "max_completion_tokens", "max_output_tokens"} & {
    name for body in openapi.BODIES.values() for name in body.__struct_fields__
}


def described(*, coverage: bool) -> OpenApiSchema:
    document = schemathesis.openapi.from_dict(openapi.document())
    document.config.phases.coverage.enabled = coverage
    # Not what stops the engine that other tests share: test_rollouts.py has its own.
    safe = document.exclude(path=[*openapi.CONTROL_BODIES, *set(openapi.POSTS) - {"/flush_cache"}])
    assert isinstance(safe, OpenApiSchema)
    return safe


def examples(count: int) -> settings:
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@described(coverage=False).parametrize()
@examples(5)
def test_answers_are_as_the_document_tells(case: AnyCase, server: Server) -> None:
    check(case, server)


@pytest.mark.slow
@described(coverage=True).parametrize()
@examples(50)
def test_answers_are_as_the_document_tells_at_every_edge(case: AnyCase, server: Server) -> None:
    check(case, server)


def check(case: AnyCase, server: Server) -> None:
    """Left out: that what the document allows is taken. It tells no model names, roles or contexts."""
    _shorten(case)
    case.call_and_validate(server.url, excluded_checks=[positive_data_acceptance], timeout=60)


def _shorten(case: AnyCase) -> None:
    """Answers of one token: without a length they would be as long as the context."""
    body, fields = case.body, LENGTHS
    if not isinstance(body, dict):
        return
    if case.path == "/generate":
        if body.get("sampling_params") is None:
            body["sampling_params"] = {}
        body, fields = body["sampling_params"], {"max_new_tokens"}
    for options in body if isinstance(body, list) else [body]:
        if isinstance(options, dict):
            for name in fields:
                if (length := options.get(name)) is None or (isinstance(length, int) and length > 1):
                    options[name] = 1
