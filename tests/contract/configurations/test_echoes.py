"""A real server reads the specs of both clients alike, and refuses what it does not know clearly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dstack_core as dstack
from tests.contract.configurations.clients import (
    JUDGE_VERSION,
    Case,
    OfficialClient,
    compared,
    options_of,
    ours,
    written,
)
from tests.contract.configurations.forms import configurations
from tests.contract.configurations.named import NAMED
from tests.contract.configurations.test_same_specs import ENV, EXAMPLES, FEW, KINDS, WANTED
from tests.rig.server import RealServer
from tests.rig.server_process import DEFAULT_VERSION

pytestmark = pytest.mark.real
newest = pytest.mark.skipif(
    DEFAULT_VERSION != JUDGE_VERSION, reason="a server as old as it refuses what is new"
)
SECONDS = 30


class Echo:
    """The replies of a real server to both clients."""

    def __init__(self, server: RealServer) -> None:
        self._session = requests.Session()
        self._session.headers["Authorization"] = f"Bearer {server.token}"
        self._url = f"{server.url}/api/project/{server.project}/runs/get_plan"

    def differences(self, case: Case, folder: Path, official: OfficialClient) -> list[str]:
        """Return the differences between the server's plans; an empty list if a client refuses to send."""
        with written(case, folder) as path:
            theirs, own = official.send(path, case), ours(path, case)
        if theirs.spec is None or own.spec is None:
            return []
        # Make equal what each client leaves to the server or chooses at random, because jobs depend on it.
        own.spec["ssh_key_pub"] = theirs.spec["ssh_key_pub"] = "ssh-ed25519 AAAA test"
        if theirs.spec["run_name"] is None:
            own.spec["run_name"] = theirs.spec["run_name"] = "chosen"
        one, other = self._plan(theirs.spec), self._plan(own.spec)
        if isinstance(one, str) or isinstance(other, str):
            both = isinstance(one, str) and isinstance(other, str)
            return [] if both else [f"theirs: {str(one)[:200]}, ours: {str(other)[:200]}"]
        return [
            *compared(one["effective_run_spec"], other["effective_run_spec"]),
            *(f"job: {line}" for line in _jobs(one, other)),
        ]

    def _plan(self, spec: Mapping[str, Any]) -> Any:
        reply = self._session.post(self._url, json={"run_spec": spec, "max_offers": 1}, timeout=SECONDS)
        assert reply.status_code in (200, 400, 422), reply.text
        return reply.json() if reply.ok else reply.text


def _jobs(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Compare what would run, without the archives' ids."""
    lines = []
    for index, (job, twin) in enumerate(zip(one["job_plans"], other["job_plans"], strict=True)):
        for key in sorted(job["job_spec"].keys() - {"file_archives"}):
            if job["job_spec"][key] != twin["job_spec"][key]:
                lines.append(
                    f"{index}.{key}: theirs {job['job_spec'][key]!r}, ours {twin['job_spec'][key]!r}"
                )
    return lines


@newest
@pytest.mark.timeout(600)
def test_a_server_reads_the_specs_of_both_clients_alike(
    real_server: RealServer, official: OfficialClient, folder: Path
) -> None:
    echo = Echo(real_server)
    found = {name: echo.differences(case, folder, official) for name, case in NAMED.items()}
    assert {name: different for name, different in found.items() if different and name not in WANTED} == {}


@newest
@pytest.mark.timeout(7200)
def test_a_server_reads_every_form_of_both_clients_alike(
    real_server: RealServer, official: OfficialClient, folder: Path
) -> None:
    echo = Echo(real_server)
    forms = st.one_of([configurations(kind, official.schema(kind)) for kind in KINDS])

    @settings(
        max_examples=EXAMPLES // 2,
        derandomize=EXAMPLES == FEW,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(forms)
    def compare(text: str) -> None:
        assert echo.differences(Case(text, env=ENV), folder, official) == []

    compare()


@pytest.mark.timeout(600)
def test_a_key_that_a_server_is_too_old_for_is_refused_by_name(
    real_server: RealServer, official: OfficialClient, folder: Path
) -> None:
    """A server plans what dstack's newest client accepts, or is reported as too old for it by the name of the key."""
    client = dstack.Client(
        server_url=real_server.url, project_name=real_server.project, user_token=real_server.token
    )
    unclear: dict[str, str] = {}
    refused: set[str] = set()
    for name, case in NAMED.items():
        with written(case, folder) as path, case.in_environment():
            theirs = official.send(path, case)
            if theirs.spec is None or official.read(theirs.spec).spec is None or name in WANTED:
                continue
            try:
                client.runs.plan(path, **options_of(case))
            except dstack.UnsupportedServerError as error:
                refused.add(name)
                if not re.search(r"\S: needs dstack >= \d+\.\d+\.\d+, this server is ", error.message):
                    unclear[name] = error.message
            except dstack.RequestRejectedError as error:
                # 400 concerns what a project has: gateways, secrets, images. 422 concerns keys.
                if error.status != 400:
                    unclear[name] = str(error)
    assert unclear == {}
    if DEFAULT_VERSION == JUDGE_VERSION:
        assert refused == set()
    elif real_server.release < (0, 19):
        assert refused >= {"fleets and instances", "schedule: one", "groups of a task", "rate limits"}
