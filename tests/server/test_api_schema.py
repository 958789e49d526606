"""Whatever the OpenAPI document allows, and much that it does not, is answered as it says and by no mistake of ours.

Schemathesis makes up the requests, always the same ones. Streams of events have no end, so they are left out.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from server.api_server import OTHER_PROMPT, PROMPT, Api, live

from opensora.server.jobs import JobError, QueueLimits
from opensora.server.settings import ServerSettings

pytestmark = [pytest.mark.slow, pytest.mark.multi]

KEPT = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"),
    *("response_headers_conformance", "negative_data_rejection", "unsupported_method", "allow_header_conformance"),
)
NUM_EXAMPLES = 8
TIMEOUT_S = 1800
CONFIGURATION = """
[dictionaries.ids]
values = {ids}
[dictionaries.prompts]
values = {prompts}
[parameters]
"path.video_id" = {{ dictionary = "ids", probability = 0.8 }}
"body.prompt" = {{ dictionary = "prompts", probability = 0.8 }}
"""


def ids_of_all_states(api: Api) -> list[str]:
    """Videos that are completed, failed, being made, waiting and held."""
    client = api.client()
    done, failed, running, waiting, held = (
        client.post("/v1/videos", json={"prompt": PROMPT, "seed": seed}).json()["id"] for seed in range(5)
    )
    api.finish(api.begin())
    api.store.fail(api.begin(), JobError("internal_error", "the worker made a mistake"))
    api.begin()
    api.store.hold(held)
    return [done, failed, running, waiting, held]


def test_answers_are_as_documented(tmp_path: Path) -> None:
    api = Api(ServerSettings(tmp_path / "server", queue=QueueLimits(most_waiting=10**6, most_of_owner=10**6)))
    configuration = CONFIGURATION.format(
        ids=json.dumps(ids_of_all_states(api)), prompts=json.dumps([PROMPT, OTHER_PROMPT])
    )
    (tmp_path / "schemathesis.toml").write_text(configuration)
    with live(api) as url:
        run = subprocess.run(
            [
                *(sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"),
                *("--config-file", "schemathesis.toml", "run", f"{url}/openapi.json", "--exclude-path", "/v1/events"),
                *("--checks", ",".join(KEPT), "--phases", "examples,coverage,fuzzing", "--no-color"),
                *("--max-examples", str(NUM_EXAMPLES), "--seed", "1", "--generation-database", "none", "--no-shrink"),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    generated = re.search(r"(\d+) generated", run.stdout)
    assert generated and int(generated[1]) > 1000
    assert any(job.kind == "remix" for job in api.store.jobs(limit=10_000))  # what there was, was reached
