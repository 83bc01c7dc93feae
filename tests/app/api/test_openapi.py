"""The application against its own OpenAPI: requests that fit the schema, and requests that do not."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import requests
import schemathesis
from builders_api import Api
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
ENDLESS = "/api/v1/events"


@pytest.mark.integration
def test_the_schema_is_kept(api: Api, acme: httpx.Client) -> None:
    """Positive data may be refused too, for what a schema cannot say (no such model): then with a proper error."""
    schema = schemathesis.openapi.from_dict(api.app.openapi())
    session, headers = requests.Session(), {"authorization": acme.headers["authorization"]}
    session.trust_env = False
    tried = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path == ENDLESS:
            continue
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and not {"parameters", "requestBody"} & operation.definition.raw.keys():
                continue  # it has no part that could be wrong
            _try(operation, mode, {"base_url": api.url, "session": session, "headers": headers})
        tried += 1
    assert tried == len(schema) - 1
    session.close()


def _try(operation: Any, mode: GenerationMode, call: dict[str, Any]) -> None:
    @settings(
        max_examples=8,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def attempt(case: schemathesis.Case) -> None:
        case.call_and_validate(**call, checks=CHECKS)

    attempt()
