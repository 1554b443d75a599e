"""``RUN_INPUTS``: a cached result is used for the same content, and never for another one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prefect import flow, task
from prefect.cache_policies import RUN_ID, TASK_SOURCE
from prefect.context import TaskRunContext
from pydantic import SecretStr

from dstack_core import ConfigurationError
from dstack_core.local import LocalServer
from prefect_dstack import RUN_INPUTS, DstackCredentials, arun_task, run_task, submit_run
from prefect_dstack._names import own_parameters
from prefect_dstack._options import OPTION_NAMES
from prefect_dstack.cache import WATCHED
from tests.option_values import VALUES, write_profiles

from .support import all_runs
from .ways import FAST

YAML = "type: task\nname: train\ncommands: [echo {}]\n"
TASK: dict[str, Any] = {"type": "task", "commands": ["echo one ${{ run.args }}"], "env": ["GIVEN=no"]}


def key(
    configuration: Any = TASK, *, policy: Any = RUN_INPUTS, run: Any = run_task, **inputs: Any
) -> str | None:
    """Return the key that the policy makes for a call."""
    context = cast(TaskRunContext, SimpleNamespace(task=run))
    own = {name: inputs.pop(name) for name in list(inputs) if name not in OPTION_NAMES}
    found = policy.compute_key(context, {"configuration": configuration, **own, "options": inputs}, {})
    assert found is None or isinstance(found, str)
    return found


@pytest.mark.usefixtures("prefect_server")
def test_a_changed_file_runs_again_and_an_unchanged_one_does_not(
    dstack: LocalServer, credentials: DstackCredentials, tmp_path: Path
) -> None:
    file = tmp_path / "train.dstack.yml"

    @flow
    def training(path: str, **options: Any) -> dict[str, Any]:
        cached = run_task.with_options(cache_policy=RUN_INPUTS)
        return dict(cached(path, credentials, **FAST, **options))

    def run(text: str, **options: Any) -> tuple[dict[str, Any], int]:
        file.write_text(YAML.format(text))
        return training(str(file), **options), len(all_runs(dstack))

    first, count = run("one")
    assert count == 1
    # The file has a new time, and the task is watched in another way.
    assert run("one", log_timestamps=True) == (first, 1)
    changed, count = run("two")
    assert count == 2
    assert changed["run_name"] != first["run_name"]
    assert run("one") == (first, 2)
    assert run("one", max_price=3)[1] == 3


@pytest.mark.usefixtures("prefect_server")
def test_the_async_twin_takes_the_result_of_the_sync_one(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    @flow
    async def training() -> list[dict[str, Any]]:
        first = run_task.with_options(cache_policy=RUN_INPUTS)(TASK, credentials, **FAST)
        second = arun_task.with_options(cache_policy=RUN_INPUTS)(TASK, credentials, **FAST)
        return [first, await second]

    first, second = asyncio.run(training())
    assert first == second
    assert len(all_runs(dstack)) == 1


def test_every_parameter_changes_the_key_or_is_one_of_watching(tmp_path: Path) -> None:
    write_profiles(tmp_path)
    (tmp_path / "code.py").write_text("one")
    changed = {
        **VALUES,
        "run_name": "train-one",
        "credentials": "gpu-team",
        "profiles_file": tmp_path / ".dstack" / "profiles.yml",
        "repo_dir": tmp_path,
        "mask_env": "all",
        "reports": False,
        "fallbacks": [{"spot_policy": "on-demand"}],
        "fallback_on_exit": {137: "next"},
    }
    parameters = set(run_task.fn.__kwdefaults__ or {}) | {"credentials"} | OPTION_NAMES
    for name in parameters - WATCHED - {"local_repo"}:
        extra = {"profiles_file": changed["profiles_file"]} if name == "profile" else {}
        extra |= {"fallbacks": changed["fallbacks"]} if name == "fallback_on_exit" else {}
        base = {"profile": "cheap", "repo_dir": tmp_path} if name == "profiles_file" else extra
        if name == "profiles_file":
            other = tmp_path / "other.yml"
            other.write_text("profiles: [{name: cheap, max_price: 3}]\n")
            assert key(**base) != key(**base, profiles_file=other)
            continue
        assert key(**base) != key(**base, **{name: changed[name]}), name
        assert key(**base, policy=RUN_INPUTS - name) == key(
            **base, **{name: changed[name]}, policy=RUN_INPUTS - name
        ), name
    for name in WATCHED:
        assert key() == key(**{name: changed.get(name, "x")}), name
    assert own_parameters() == []


@pytest.mark.parametrize("change", ["content", "name", "mode"])
@pytest.mark.parametrize("way", ["repo_dir", "files", "repos", "file"])
def test_code_counts_by_its_content(way: str, change: str, tmp_path: Path) -> None:
    def keyed(folder: str) -> str | None:
        path = tmp_path / folder
        (path / "src").mkdir(parents=True)
        (path / "src" / "train.py").write_text("print(1)")
        (path / ".gitignore").write_text("*.log\n")
        if folder == "changed":
            if change == "content":
                (path / "src" / "train.py").write_text("print(2)")
            elif change == "name":
                (path / "src" / "train.py").rename(path / "src" / "fit.py")
            else:
                (path / "src" / "train.py").chmod(0o755)
        if folder == "same" and way == "repo_dir":
            (path / "train.log").write_text("ignored")
        if way == "repo_dir":
            return key(repo_dir=path)
        if way == "repos":
            return key({**TASK, "repos": [{"local_path": str(path), "path": "."}]})
        entry = next(iter((path / "src").iterdir())) if way == "file" else path / "src"
        return key({**TASK, "files": [{"local_path": str(entry), "path": "code"}]})

    first = keyed("first")
    assert first is not None
    assert keyed("same") == first
    assert keyed("changed") != first


def test_a_link_in_the_code_counts_by_its_target(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("same")
    (tmp_path / "two").write_text("same")
    (tmp_path / "link").symlink_to("one")
    first = key(repo_dir=tmp_path)
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("two")
    assert key(repo_dir=tmp_path) != first


def test_secrets_do_not_count_and_open_names_do(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = ({"TOKEN": SecretStr(text)} for text in ("first-secret", "second-secret"))
    assert key(env=one) == key(env=two) != key()
    blocks = [
        DstackCredentials(server_url="http://a", project_name="p", user_token=SecretStr(text))
        for text in "xy"
    ]
    assert key(credentials=blocks[0]) == key(credentials=blocks[1])
    elsewhere = blocks[0].model_copy(update={"project_name": "other"})
    assert key(credentials=blocks[0]) != key(credentials=elsewhere)

    def taken(name: str, value: str) -> str | None:
        monkeypatch.setenv(name, value)
        return key({"type": "task", "commands": ["x"], "env": [name]})

    assert taken("DATASET", "first-dataset") != taken("DATASET", "second-dataset")
    assert taken("HF_TOKEN", "first-token") == taken("HF_TOKEN", "second-token")


def test_a_submitted_run_is_not_the_outcome_of_one() -> None:
    assert key(run=submit_run) != key(run=run_task)


def test_it_adds_to_the_policies_of_prefect() -> None:
    assert (RUN_INPUTS + RUN_ID).policies[0] == RUN_INPUTS  # type: ignore[attr-defined]
    assert (TASK_SOURCE + RUN_INPUTS).policies[-1] == RUN_INPUTS  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="RUN_INPUTS: expected the name of a parameter, got 3"):
        RUN_INPUTS - cast(Any, 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda folder: key({"type": "task", "commands": 3}),
        lambda folder: key(str(folder / "missing.yml")),
        lambda folder: key(repo_dir=folder / "missing"),
        lambda folder: key({**TASK, "files": [str(folder / "missing")]}),
    ],
)
def test_what_the_task_refuses_has_no_key(call: Callable[[Path], str | None], tmp_path: Path) -> None:
    assert call(tmp_path) is None


@pytest.mark.usefixtures("prefect_server")
def test_a_task_without_a_configuration_is_not_cached(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    @task(cache_policy=RUN_INPUTS)
    def other(number: int) -> int:
        calls.append(number)
        return number

    @flow
    def twice() -> list[int]:
        return [other(1), other(1)]

    with caplog.at_level(logging.ERROR):
        assert twice() == [1, 1]
    assert calls == [1, 1]
    assert "Use Prefect's INPUTS for it." in caplog.text
    with pytest.raises(ConfigurationError, match="such as run_task, got the task 'other'"):
        RUN_INPUTS.compute_key(cast(TaskRunContext, SimpleNamespace(task=other)), {"number": 1}, {})
