"""Requests that are generated from /openapi.json get the responses that it describes."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.helpers.oracles import require_module
from tests.helpers.server_process import Server, run_server

pytestmark = pytest.mark.slow
EXAMPLES = 50
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    words = ["--models", "tiny", "--data-dir", tmp_path_factory.mktemp("data"), "--no-warmup"]
    with run_server(*words, "--max-queue", "1000") as running:
        yield running


def test_responses_are_those_of_the_description(server: Server) -> None:
    schemathesis = require_module("schemathesis")
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    found = schemathesis.checks.CHECKS.get_by_names(list(CHECKS))
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 20
    for operation in operations:

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            case.call_and_validate(checks=found)

        check()
    assert server.call("GET", "/livez")[0] == 200
