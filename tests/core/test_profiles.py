"""Profiles: which file is read, how they combine with a configuration and arguments, and what is sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from dstack_core import (
    AsyncClient,
    Client,
    ConfigurationError,
    Profile,
    Task,
    UnsupportedServerError,
    load_profile,
)
from dstack_core._code.deliver import CodeSource
from dstack_core._code.repository import Repository
from dstack_core._operations import Operations
from dstack_core._wire.api import Api
from dstack_core._wire.spec import run_spec
from dstack_core.models.options import SubmitOptions
from tests.core.scripted import MISSING, Driver, Script, recorded_reply, reply, run_json

TWO = "profiles:\n- {name: cheap, max_price: 1, default: true}\n- {name: big, max_price: 90, regions: [eu]}\n"
OWN = "profiles:\n- {name: own, max_price: 5, default: true}\n- {name: big, max_price: 7}\n"


def write(folder: Path, text: str, name: str = "profiles.yml") -> Path:
    (folder / ".dstack").mkdir(exist_ok=True)
    path = folder / ".dstack" / name
    path.write_text(text)
    return path


def test_without_any_file_a_profile_is_empty(tmp_path: Path) -> None:
    assert load_profile() == load_profile(None, tmp_path) == Profile()
    assert run_spec(Task(commands=["x"]), SubmitOptions(profile=Profile()))["profile"] == {"name": "default"}


@pytest.mark.parametrize("name", ["profiles.yml", "profiles.yaml"])
def test_the_file_beside_the_code_overrides_the_users_own(name: str, tmp_path: Path) -> None:
    write(Path.home(), OWN)
    assert load_profile(None, tmp_path).name == "own"
    write(tmp_path, TWO, name)
    assert load_profile(None, tmp_path).name == "cheap"
    assert load_profile("big", tmp_path).max_price == 90
    assert load_profile("own", tmp_path).max_price == 5
    assert load_profile("big").max_price == 7


def test_without_a_default_in_the_file_the_users_own_default_is_used(tmp_path: Path) -> None:
    write(Path.home(), OWN)
    write(tmp_path, "profiles:\n- {name: big, max_price: 90}\n")
    assert load_profile(None, tmp_path).name == "own"
    assert load_profile(None, tmp_path, home=False) == Profile()


def test_the_environment_chooses_a_profile_or_no_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, TWO)
    monkeypatch.setenv("DSTACK_PROFILE", "big")
    assert load_profile(None, tmp_path).name == "big"
    assert load_profile("cheap", tmp_path).name == "cheap"
    monkeypatch.setenv("DSTACK_NO_PROFILE", "true")
    assert load_profile(None, tmp_path) == Profile(name="no-profile")
    assert load_profile("cheap", tmp_path).name == "cheap"
    monkeypatch.setenv("DSTACK_NO_PROFILE", "0")
    assert load_profile(None, tmp_path).name == "big"
    monkeypatch.setenv("DSTACK_NO_PROFILE", "maybe")
    with pytest.raises(ConfigurationError, match=r'DSTACK_NO_PROFILE: expected "1" or "0", got \'maybe\''):
        load_profile(None, tmp_path)


def test_without_home_a_workers_own_profiles_are_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(Path.home(), OWN)
    write(tmp_path, TWO)
    monkeypatch.setenv("DSTACK_PROFILE", "own")
    assert load_profile(None, tmp_path, home=False).name == "cheap"
    assert load_profile(home=False) == Profile()
    with pytest.raises(ConfigurationError, match=r"got 'own'"):
        load_profile("own", tmp_path, home=False)


def test_a_named_file_is_the_only_one_read(tmp_path: Path) -> None:
    write(Path.home(), OWN)
    file = tmp_path / "gpu.yml"
    file.write_text(TWO)
    assert load_profile("big", Path.home(), file=file).max_price == 90
    assert load_profile(None, file=str(file)).name == "cheap"
    with pytest.raises(ConfigurationError) as caught:
        load_profile("own", file=file)
    assert str(caught.value) == (
        f"profile: expected one of those in {file} ('cheap', 'big'), got 'own'. Correct the name, or add the profile."
    )


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    write(Path.home(), OWN)
    write(tmp_path, TWO)
    with pytest.raises(ConfigurationError, match=r"\('cheap', 'big', 'own', 'big'\), got 'huge'"):
        load_profile("huge", tmp_path)
    with pytest.raises(ConfigurationError, match=r"expected one of those in no file \(none\), got 'huge'"):
        load_profile("huge", home=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("profiles: 3", r"profiles: expected a list of `profiles` in .*profiles\.yml, got none"),
        ("", r"profiles: expected a list of `profiles` in .*profiles\.yml"),
        ("profiles: [{name: x}", r"profiles\.yml, line \d: expected YAML"),
        (
            "profiles: [{name: x, max_price: cheap}]",
            r"profiles\.yml: Profile\.max_price: expected USD .*'cheap'",
        ),
        ("profiles: [3]", r"profiles\.yml: Profile: "),
        ("profiles: [{name: x, defualt: true}]", r"profiles\.yml: Profile\.defualt: there is no such field"),
    ],
)
def test_a_wrong_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, text)
    with pytest.raises(ConfigurationError, match=message):
        load_profile(None, tmp_path)


def test_a_missing_named_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"profiles: expected a file at .*none\.yml, got none"):
        load_profile(file=tmp_path / "none.yml")


def test_a_profile_is_sent_as_dstacks_client_sends_it() -> None:
    written = {"name": "cheap", "default": True, "max_price": "2.5", "max_duration": "off", "retry": True}
    profile = Profile.model_validate({**written, "regions": [1]})
    wire = run_spec(Task(commands=["x"], max_price=1), SubmitOptions(profile=profile))
    assert wire["profile"] == {
        "name": "cheap",
        "default": True,
        "max_price": 2.5,
        "max_duration": "off",
        "retry": True,
        "regions": ["1"],
    }
    # On the server, what the configuration sets takes precedence.
    assert wire["configuration"] == {"type": "task", "commands": ["x"], "max_price": 1.0}


def test_arguments_override_a_profile() -> None:
    options = SubmitOptions(profile=Profile(name="p", max_price=1, spot_policy="auto"), max_price=3)
    spec = run_spec(Task(commands=["x"]), options)
    assert (spec["configuration"]["max_price"], spec["profile"]["max_price"]) == (3.0, 1.0)


def test_an_old_server_reads_the_profile_of_an_idle_machine_that_stays() -> None:
    # It does not know the text "off" there and accepts false.
    spec = run_spec(
        Task(commands=["x"], idle_duration="off"), SubmitOptions(profile=Profile(idle_duration="off"))
    )
    assert spec["profile"]["idle_duration"] is spec["configuration"]["idle_duration"] is False


def apply_script(version: str = "0.22.5") -> Script:
    return Script(
        users__get_my_user=[recorded_reply(f"users_get_my_user_{version}")],
        runs__get=[MISSING],
        runs__apply=[lambda body: reply(run_json("submitted", marker=None))],
        runs__get_plan=[lambda body: reply({"job_plans": [], "run_spec": {}})],
        fleets__list=[lambda body: reply([])],
        server__get_info=[reply({"server_version": version})],
    )


def session(folder: Path | None = None) -> Operations:
    return Operations(Api("http://server", "main"), 30, code=CodeSource(Repository(folder, local_repo=True)))


def submitted(driver: Driver, session: Operations, script: Script, **given: Any) -> dict[str, Any]:
    options = cast(SubmitOptions, given)
    flow = session.submit(
        Task(commands=["x ${{ run.args }}"], env=["A"]),
        "train",
        options,
        verify_ports=False,
        marker=None,
        retry_budget=None,
    )
    driver.run(flow, script)
    spec: dict[str, Any] = script.bodies("runs/apply")[-1]["plan"]["run_spec"]
    return spec


def test_submit_and_plan_take_the_default_profile(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    write(Path.home(), OWN)
    monkeypatch.setenv("A", "here")
    script = apply_script()
    spec = submitted(driver, session(), script, args=["b c"])
    assert spec["profile"] == {"name": "own", "max_price": 5.0, "default": True}
    assert spec["configuration"]["env"] == {"A": "here"}
    assert spec["configuration"]["commands"] == ["x 'b c'"]
    assert submitted(driver, session(), script, profile="big")["profile"] == {"name": "big", "max_price": 7.0}
    given = Profile(name="given", max_price=3)
    assert submitted(driver, session(), script, profile=given)["profile"]["name"] == "given"
    assert submitted(driver, session(), script, profile=Profile())["profile"] == {"name": "default"}
    driver.run(session().plan(Task(commands=["x"]), SubmitOptions()), script)
    assert script.bodies("runs/get_plan")[-1]["run_spec"]["profile"]["name"] == "own"


def test_profiles_are_read_from_the_repo_dir_or_else_the_current_directory(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, code = tmp_path / "here", tmp_path / "code"
    here.mkdir()
    code.mkdir()
    write(here, "profiles: [{name: here, default: true}]")
    write(code, "profiles: [{name: code, default: true}]")
    monkeypatch.chdir(here)
    script = apply_script()
    driver.run(session(code).plan(Task(commands=["x"]), SubmitOptions()), script)
    driver.run(session().plan(Task(commands=["x"]), SubmitOptions()), script)
    names = [body["run_spec"]["profile"]["name"] for body in script.bodies("runs/get_plan")]
    assert names == ["code", "here"]


def test_a_profile_that_a_server_is_too_old_for_is_refused_first(driver: Driver) -> None:
    script = apply_script("0.18.44")
    flow = session().plan(Task(commands=["x"]), SubmitOptions(profile=Profile(name="p", fleets=["a"])))
    with pytest.raises(
        UnsupportedServerError, match=r"fleets: needs dstack >= 0\.19\.3, this server is 0\.18"
    ):
        driver.run(flow, script)
    assert script.paths() == ["server/get_info"]


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_profile_of_another_kind_is_refused(kind: type[Any]) -> None:
    client = kind(server_url="http://127.0.0.1:9", project_name="main", user_token="t")
    with pytest.raises(ConfigurationError, match=r"profile: expected a name or a Profile, got 3"):
        client._operations.plan(Task(commands=["x"]), SubmitOptions(profile=3))  # type: ignore[typeddict-item]


def test_arguments_that_no_command_uses_are_reported(
    driver: Driver, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A", "")
    submitted(driver, session(), apply_script(), args=["1"])
    assert caplog.messages == []
    flow = session().submit(
        Task(commands=["x"]),
        "t1",
        SubmitOptions(args=["1"]),
        verify_ports=False,
        marker=None,
        retry_budget=None,
    )
    driver.run(flow, apply_script())
    assert caplog.messages == ["args: no command has ${{ run.args }}, so the arguments are not used."]
