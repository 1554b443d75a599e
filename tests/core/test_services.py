"""A service's address, and when it counts as ready, with replies recorded from real servers' proxies."""

from __future__ import annotations

from typing import Any

import pytest

from dstack_core import Run, RunFailedError, RunStoppedError, errors
from dstack_core._operations import Operations
from dstack_core._transport.blocking import BlockingTransport
from dstack_core._transport.settings import TransportSettings
from dstack_core._wire.api import Api
from dstack_core._wire.http_messages import Reply, Request
from dstack_core._wire.runs import parse_run
from dstack_core._wire.services import service_answers
from tests.core.scripted import LOST, MISSING, Answer, Driver, Script, recorded, reply, run_json

API = Api("http://server", "main")
NOT_YET = reply({"detail": "Service main/chat not found"}, 404)
NOBODY = reply({"detail": "Error requesting upstream"}, 502)
OK = Reply(200, {}, b"hello")


class Server(Script):
    """A server with a list of answers for ``runs/get`` and one for the service; the last answer repeats."""

    def __init__(self, runs: list[Answer], service: list[Answer]) -> None:
        super().__init__()
        self.runs, self.service = list(runs), list(service)
        self.sent: list[Request] = []

    def send(self, request: Request) -> Reply:
        self.sent.append(request)
        answers = self.runs if request.path.startswith("/api/") else self.service
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        assert not callable(answer)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def asked(self) -> list[tuple[str, str]]:
        return [(r.method, r.path) for r in self.sent if not r.path.startswith("/api/")]


def service(url: str = "/proxy/services/main/chat/", **changes: Any) -> Reply:
    return reply(run_json(name="chat", service={"url": url, "model": None, "options": {}}, **changes))


def wait(driver: Driver, server: Server) -> Any:
    session = Operations(API, 30.0, clock=driver.clock)
    flow = session.wait_until_ready("chat", "id-1", poll_interval=2.0, retry_budget=600.0)
    return driver.run(flow, server)


def test_the_address_is_returned_once_the_service_itself_answers(driver: Driver) -> None:
    server = Server([service()], [NOT_YET, NOT_YET, NOBODY, OK])
    assert wait(driver, server) == "http://server/proxy/services/main/chat/"
    url = "http://server/proxy/services/main/chat/"
    assert server.asked() == [("HEAD", url), ("GET", url), ("HEAD", url), ("HEAD", url)]
    assert driver.clock.slept == [2.0, 2.0]
    assert not any(request.anonymous for request in server.sent)


def test_the_service_is_not_polled_before_a_job_runs_and_a_lost_reply_does_not_count(driver: Driver) -> None:
    waiting = service(status="submitted")
    server = Server([waiting, waiting, service()], [LOST, OK])
    wait(driver, server)
    assert len(server.asked()) == 2
    assert driver.clock.slept == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("url", "anonymous"), [("https://chat.gateway.example", False), ("http://chat.gateway.example", True)]
)
def test_a_gateways_address_is_complete_and_gets_no_token_over_plain_http(
    driver: Driver, url: str, anonymous: bool
) -> None:
    server = Server([service(url)], [OK])
    assert wait(driver, server) == url
    assert (server.sent[-1].path, server.sent[-1].anonymous) == (url, anonymous)


def test_a_run_that_ends_before_it_is_ready_raises_its_own_error(driver: Driver) -> None:
    with pytest.raises(RunFailedError, match=r"Run chat .*See http://server/projects/main/runs/id-1"):
        wait(driver, Server([service(), service(status="failed")], [NOBODY]))
    with pytest.raises(RunFailedError, match="Run chat finished before it answered"):
        wait(driver, Server([service(status="done")], [NOBODY]))
    stopped = service(status="terminated", termination_reason="stopped_by_user")
    with pytest.raises(RunStoppedError):
        wait(driver, Server([stopped], [NOBODY]))


def test_a_task_and_a_deleted_run_are_errors(driver: Driver) -> None:
    with pytest.raises(errors.ConfigurationError, match="run chat: expected a service"):
        wait(driver, Server([reply(run_json(name="chat"))], [OK]))
    with pytest.raises(errors.RunNotFoundError, match="no longer in project main"):
        wait(driver, Server([MISSING], [OK]))


@pytest.mark.parametrize(
    ("answer", "method", "answers"),
    [
        (OK, "HEAD", True),
        (Reply(401, {}, b""), "HEAD", True),
        (Reply(405, {}, b""), "HEAD", True),
        (Reply(500, {}, b""), "HEAD", True),
        (Reply(302, {"location": "/login"}, b""), "HEAD", True),
        (Reply(503, {}, b""), "HEAD", False),
        (Reply(404, {}, b""), "HEAD", None),
        (NOT_YET, "GET", False),
        (reply({"detail": "Not Found"}, 404), "GET", True),
        (Reply(404, {}, b"<html>no such page</html>"), "GET", True),
    ],
)
def test_any_reply_of_the_service_itself_counts_as_an_answer(
    answer: Reply, method: str, answers: bool | None
) -> None:
    assert service_answers(answer, method) is answers


def test_a_recorded_service_has_an_address_and_a_task_has_none() -> None:
    transport = BlockingTransport(TransportSettings("http://server", "t"))

    def run(body: Any) -> Run:
        return Run(Operations(API, 30.0), transport, parse_run(body))

    plain = run(recorded("runs_get_service_running_0.22.5"))
    assert (plain.service_url or "").startswith("http://server/proxy/services/main/svc-")
    assert (plain.service_model, plain.service_model_url) == (None, None)
    model = {"name": "llama", "base_url": "/proxy/services/main/chat/v1", "type": "chat"}
    with_model = run(run_json(service={"url": "https://chat.example", "model": model}))
    assert (with_model.service_url, with_model.service_model) == ("https://chat.example", "llama")
    assert with_model.service_model_url == "http://server/proxy/services/main/chat/v1"
    assert run(run_json()).service_url is None
