"""What a server is too old for is told in one sentence; the version is asked only where it matters."""

from __future__ import annotations

from typing import Any

import pytest

from dstack_core import Configuration, Task, errors, load_configuration
from dstack_core._operations import Operations
from dstack_core._wire import versions
from dstack_core._wire.api import Api
from dstack_core._wire.http_messages import Reply
from dstack_core.models.options import SubmitOptions
from tests.core.scripted import LOST, MISSING, Driver, Script, recorded_reply, reply, run_json

API = Api("http://server", "main")
INFO = "server__get_info"
KEY = reply({"username": "admin", "ssh_public_key": "ssh-rsa AAAA x"})


def session(driver: Driver) -> Operations:
    return Operations(API, 30.0, clock=driver.clock)


def server(release: str | None, **answers: Any) -> Script:
    info = recorded_reply(f"server_get_info_{release}") if release else reply({"server_version": None})
    submitted = [MISSING, reply(run_json())]
    script = {"users__get_my_user": [KEY], "runs__get": submitted, "runs__apply": [reply(run_json())]}
    return Script(**{INFO: [info], **script, **answers})


def submit(
    driver: Driver, script: Script, configuration: Configuration, use: Operations | None = None
) -> Any:
    flow = (use or session(driver)).submit(
        configuration, "train", SubmitOptions(), verify_ports=False, marker="mine", retry_budget=None
    )
    return driver.run(flow, script)


def test_an_ordinary_submit_does_not_ask_for_the_version(driver: Driver) -> None:
    script = server("0.22.5")
    submit(driver, script, Task(commands=["x"], volumes=["v:/data"], nodes=2, max_duration="2h"))
    assert script.paths() == ["users/get_my_user", "runs/get", "runs/apply"]


def test_a_gated_field_asks_once_per_client(driver: Driver) -> None:
    script, use = server("0.22.5", runs__get=[MISSING]), session(driver)
    for _ in range(2):
        submit(driver, script, Task(commands=["x"], fleets=["a"], tags={"a": "b"}), use)
    assert script.paths().count("server/get_info") == 1
    assert script.paths().count("runs/apply") == 2


@pytest.mark.parametrize(
    ("fields", "release", "text"),
    [
        ({"fleets": ["a"]}, "0.18.44", r"^fleets: needs dstack >= 0\.19\.3, this server is 0\.18\.44 \(http://server\)\. Remove what needs it"),
        ({"tags": {"a": "b"}, "priority": 1}, "0.18.44", r"tags: needs dstack >= 0\.19\.5, priority: needs dstack >= 0\.19\.10, this server"),
        ({"env": {"T": "x ${{ secrets.t }}"}}, "0.18.44", r"secrets: needs dstack >= 0\.19\.17"),
        ({"registry_auth": {"username": "u", "password": "${{secrets.p}}"}}, "0.18.44", r"secrets: needs dstack >= 0\.19\.17"),
        ({"python": "3.14"}, "0.20.24", r"python 3\.14: needs dstack >= 0\.21\.0, this server is 0\.20\.24"),
        ({"dstack": True}, "0.19.40", r"dstack: needs dstack >= 0\.20\.28, this server is 0\.19\.40"),
    ],
)  # fmt: skip
def test_too_old_for_a_field_is_told_before_anything_is_submitted(
    driver: Driver, fields: dict[str, Any], release: str, text: str
) -> None:
    script = server(release)
    with pytest.raises(errors.UnsupportedServerError, match=text):
        submit(driver, script, load_configuration({"type": "task", "commands": ["x"], **fields}))
    assert script.paths() == ["server/get_info"]
    loaded = load_configuration({"type": "task", "commands": ["x"], **fields})
    with pytest.raises(errors.UnsupportedServerError, match=text):
        driver.run(session(driver).plan(loaded, SubmitOptions()), script)


def test_a_server_that_has_it_and_one_that_tells_no_version_take_it(driver: Driver) -> None:
    for script in (server("0.19.40"), server(None), server("0.22.5", **{INFO: [reply({}, 404)]})):
        assert submit(driver, script, Task(commands=["x"], fleets=["a"])).name == "train"


def test_the_version_of_a_server_that_is_away_is_waited_for(driver: Driver) -> None:
    script = server("0.22.5", **{INFO: [LOST, recorded_reply("server_get_info_0.22.5")]})
    submit(driver, script, Task(commands=["x"], fleets=["a"]))
    assert script.paths().count("server/get_info") == 2


@pytest.mark.parametrize("release", ["0.18.44", "0.19.40"])
def test_a_call_an_old_server_lacks_is_told_with_what_it_needs(driver: Driver, release: str) -> None:
    script = server(release, events__list=[recorded_reply(f"events_list_{release}")])
    text = rf"^events: needs dstack >= 0\.20\.0, this server is {release} \(http://server\)"
    with pytest.raises(errors.UnsupportedServerError, match=text):
        driver.run(session(driver).events("id-1", None), script)


def test_older_than_all_supported_is_one_sentence(driver: Driver) -> None:
    old = reply({"server_version": "0.18.23"})
    text = r"^dstack 0\.18\.44 or newer is needed, this server is 0\.18\.23 \(http://server\)\. Upgrade"
    for refusal in (
        recorded_reply("error_422_unknown_key_0.18.44"),
        reply({"detail": "Method Not Allowed"}, 405),
        reply({"detail": "Not Found"}, 404),
    ):
        script = server("0.22.5", **{INFO: [old], "runs__get": [refusal]})
        with pytest.raises(errors.UnsupportedServerError, match=text):
            driver.run(session(driver).get("train", "id-1"), script)


def test_a_refusal_of_a_server_new_enough_keeps_its_words_and_says_which_server(driver: Driver) -> None:
    refusal = recorded_reply("error_422_unknown_key_0.22.5")
    script = server("0.22.5", runs__get=[refusal])
    with pytest.raises(errors.RequestRejectedError, match=r"refused the request: .* \(this server is dstack 0\.22\.5\)$") as caught:  # fmt: skip
        driver.run(session(driver).get("train", "id-1"), script)
    assert caught.value.status == 422
    script = server("0.22.5", runs__get=[reply({"detail": "Method Not Allowed"}, 405)])
    with pytest.raises(
        errors.UnsupportedServerError, match=r"runs dstack 0\.22\.5, which does not have this call"
    ):
        driver.run(session(driver).get("train", "id-1"), script)


@pytest.mark.parametrize("info", [LOST, reply({"detail": "Not Found"}, 404), Reply(200, {}, b"<html>")])
def test_a_refusal_stands_when_the_version_cannot_be_had(driver: Driver, info: Any) -> None:
    script = server("0.22.5", **{INFO: [info], "runs__get": [reply({"detail": "Method Not Allowed"}, 405)]})
    with pytest.raises(errors.UnsupportedServerError, match=r"0\.18\.44 or newer is needed$"):
        driver.run(session(driver).get("train", "id-1"), script)
    assert script.paths() == ["runs/get", "server/get_info"]
    assert driver.clock.slept == [], "nobody waits for the version of a server that refused"


def test_what_is_no_dstack_server_is_told_as_that(driver: Driver) -> None:
    nginx = Reply(404, {}, b"<html>nginx</html>")
    with pytest.raises(errors.ProtocolError, match=r"Is this the address of a dstack server\?"):
        driver.run(session(driver).get("x"), server(None, **{INFO: [nginx], "runs__get": [nginx]}))


@pytest.mark.parametrize("release", ["0.18.44", "0.19.40", "0.20.24", "0.21.5", "0.22.5"])
def test_versions_of_all_servers_can_be_read(release: str) -> None:
    read = API.get_release().parse(recorded_reply(f"server_get_info_{release}"))
    assert read == tuple(int(part) for part in release.split("."))
    versions.check((), read, "http://server")


@pytest.mark.parametrize(
    ("text", "release"), [("0.20.0rc1", (0, 20, 0)), ("latest", None), (None, None), (3, None)]
)
def test_versions_of_other_shapes(text: Any, release: Any) -> None:
    assert versions.parse_release(text) == release
