"""What a function returned or raised, from what its run reported; and how its program reports."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dstack_core import (
    ConfigurationError,
    FunctionSkipped,
    NoCapacityError,
    Outcome,
    RemoteFunctionError,
    RunFailedError,
    RunStatus,
    RunStoppedError,
    UnusableFunctionError,
)
from dstack_core._function import main
from dstack_core._wire.reports import Message, take
from dstack_core.integration import FunctionCall, choose_report

KEY = "0123456789abcdef"
DONE = Outcome(
    run_name="train-1",
    run_id="id-1",
    project="main",
    status=RunStatus.DONE,
    exit_status=0,
    reason=None,
    message="finished",
    cost=0.0,
    duration=1.0,
    instance=None,
    backend=None,
    region=None,
    price_per_hour=None,
    url="http://server/run",
)
FAILED = replace(DONE, status=RunStatus.FAILED, exit_status=1, message="failed")
CALL = FunctionCall.for_reading("train")


def payloads(output: bytes) -> list[dict[str, Any]]:
    """Return the messages in an output, as the log's reader takes them out of it."""
    _, found, parts = take(output, {}, 10_000_000)
    assert not parts
    messages = [each for each in found if isinstance(each, Message)]
    assert len(messages) == len(found)
    assert {message.kind for message in messages} <= {"function"}
    return [message.payload for message in messages]


@pytest.mark.parametrize("size", [1, 2900, 2930, 3000, 3100, 100_000])
def test_the_reader_of_logs_reads_what_the_program_writes(size: int) -> None:
    content = {"state": "returned", "value": "\u00fc\n::dstack::" + "x" * size}
    lines = main.report_lines(KEY, content)
    assert all(len(line) < 3100 and line.isascii() for line in lines)
    for end in ("\n", "\r\n"):
        log = f"a progress bar {end.join(lines)}{end}more{end}".encode()
        assert payloads(log) == [{"key": KEY, **content}]


@pytest.mark.parametrize("data", [b"", b"a", b"abc" * 1000, bytes(range(256)) * 17])
def test_the_checksum_is_that_of_cksum(data: bytes) -> None:
    printed = subprocess.run(["cksum"], input=data, capture_output=True, check=True).stdout
    assert main.cksum(data) == int(printed.split()[0])


def of(state: str, key: str = KEY, **content: Any) -> dict[str, Any]:
    return {"key": key, "state": state, **content}


def test_which_report_counts() -> None:
    one, two, error, other = of("returned", value=1), of("returned", value=2), of("raised"), of("unusable")
    assert choose_report([], KEY) is None
    assert choose_report([(0, of("returned", "another"))], KEY) is None
    assert choose_report([(0, one), (0, two)], KEY) == two
    # Of several nodes, the first error is the cause of the others.
    assert choose_report([(0, one), (0, error), (0, other)], KEY) == error
    # The server tried the run again.
    assert choose_report([(0, error), (1, one)], KEY) == one
    assert choose_report([(1, one), (0, error)], KEY) == one


def test_values_come_back() -> None:
    assert CALL.read(of("returned", value={"a": [1, None]}), DONE) == {"a": [1, None]}
    value = CALL.read(of("returned", text='{"loss": NaN, "most": Infinity}'), DONE)
    assert math.isnan(value["loss"])
    assert value["most"] == math.inf


def test_an_exception_comes_back_and_can_be_pickled() -> None:
    lines = ["Traceback (most recent call last):", "KeyError: 'x'"]
    payload = of("raised", type="KeyError", message="'x'", traceback=lines)
    with pytest.raises(
        RemoteFunctionError, match="train raised an exception in run train-1:\n  Traceback"
    ) as caught:
        CALL.read(payload, FAILED)
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):  # noqa: S301
        assert isinstance(error, RemoteFunctionError)
        assert isinstance(error, RunFailedError)
        assert (error.type_name, error.text, error.traceback, error.outcome) == (
            "KeyError",
            "'x'",
            lines,
            FAILED,
        )


def test_a_skip_comes_back_and_can_be_pickled() -> None:
    with pytest.raises(FunctionSkipped, match="train skipped itself in run train-1: nothing new") as caught:
        CALL.read(of("skipped", reason="nothing new"), DONE)
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):  # noqa: S301
        assert (error.reason, error.outcome) == ("nothing new", DONE)


@pytest.mark.parametrize(
    ("payload", "outcome", "kind"),
    [
        (of("unusable", reason="no Python"), FAILED, UnusableFunctionError),
        (of("exited", status=3), replace(FAILED, exit_status=3), RunFailedError),
        # Another node failed after the first one had returned.
        (of("returned", value=1), FAILED, RunFailedError),
        (of("raised", type="KeyboardInterrupt"), replace(DONE, status=RunStatus.TERMINATED), RunStoppedError),
        (of("raised", type="KeyboardInterrupt"), FAILED, RunFailedError),
        (
            of("raised", type="ValueError"),
            replace(FAILED, reason="interrupted_by_no_capacity"),
            NoCapacityError,
        ),
    ],
)
def test_other_ends_raise_their_error(
    payload: dict[str, Any], outcome: Outcome, kind: type[Exception]
) -> None:
    with pytest.raises(kind) as caught:
        CALL.read(payload, outcome)
    assert type(caught.value) is kind


@pytest.mark.parametrize("switch", ["argument", "environment"])
def test_no_result_is_unpickled_where_it_is_forbidden(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if switch == "environment":
        monkeypatch.setenv("DSTACK_FORBID_CLOUDPICKLE", "1")
    call = FunctionCall.for_reading(
        "train", serializer="cloudpickle", allow_cloudpickle=switch == "environment"
    )
    with pytest.raises(ConfigurationError, match="which is forbidden here"):
        call.read(of("returned", value="gASVAwAAAAAAAABLAS4="), DONE)


def test_a_result_that_cannot_be_unpickled_is_reported() -> None:
    pytest.importorskip("cloudpickle")
    call = FunctionCall.for_reading("train", serializer="cloudpickle")
    assert call.read(of("returned", value="gASVAwAAAAAAAABLAS4="), DONE) is not None
    with pytest.raises(UnusableFunctionError, match=r"expected a result that Python .* can unpickle"):
        call.read(of("returned", value="AAAA"), DONE)


def start(
    folder: Path, *, python: str = sys.executable, **environment: str
) -> tuple[int, list[dict[str, Any]], str]:
    """Run the program in the folder as a run does; return its status, its reports and its output."""
    done = subprocess.run(
        [python, "-u", folder / "main.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "HOME": str(folder), **environment},
        check=False,
    )
    return done.returncode, payloads(done.stdout), done.stdout.decode()


def content(folder: Path, **changes: Any) -> None:
    """Change what ``call.json`` holds."""
    path = folder / "call.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def double(value: Any) -> Any:
    return value * 2


def test_the_call_is_removed_before_the_function_starts(tmp_path: Path) -> None:
    FunctionCall.pack(double, ["ab"]).write(tmp_path, KEY)
    assert start(tmp_path)[:2] == (0, [of("returned", value="abab")])
    assert not (tmp_path / "call.json").exists()


def sets_a_rank() -> Any:
    import os

    os.environ["RANK"] = os.environ["DSTACK_NODE_RANK"] = "1"
    return 3


def test_a_rank_that_the_function_or_the_image_sets_changes_nothing(tmp_path: Path) -> None:
    FunctionCall.pack(sets_a_rank).write(tmp_path, KEY)
    assert start(tmp_path, RANK="7")[:2] == (0, [of("returned", value=3)])


def test_another_node_returns_nothing(tmp_path: Path) -> None:
    FunctionCall.pack(double, [1]).write(tmp_path, KEY)
    assert start(tmp_path, DSTACK_NODE_RANK="1")[:2] == (0, [])


def test_another_python_is_reported_before_anything_is_installed(tmp_path: Path) -> None:
    FunctionCall.pack(double, [1]).write(tmp_path, KEY)
    content(
        tmp_path, serializer="cloudpickle", python="2.7", cloudpickle="3.1", requirements="nothing-there\n"
    )
    status, (report,), _ = start(tmp_path)
    assert (status, report["state"]) == (1, "unusable")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert report["reason"].startswith(
        f"expected Python 2.7 in the run, which pickled the function, got Python {here}. Set python='2.7'"
    )


@pytest.mark.parametrize(
    ("module", "shown_text"),
    [
        (
            "__version__ = '1.2.3'",
            "expected cloudpickle 3.1 in the run, which pickled the function, got 1.2.3",
        ),
        ("raise ImportError", "expected the package cloudpickle in the run, and its Python"),
    ],
)
def test_another_cloudpickle_is_reported(tmp_path: Path, module: str, shown_text: str) -> None:
    FunctionCall.pack(double, [1]).write(tmp_path, KEY)
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    content(tmp_path, serializer="cloudpickle", python=here, cloudpickle="3.1", pickle="")
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "cloudpickle.py").write_text(module)
    status, (report,), _ = start(tmp_path, PYTHONPATH=str(tmp_path / "packages"))
    assert (status, report["state"]) == (1, "unusable")
    assert shown_text in report["reason"]
    assert "requirements=['cloudpickle==3.1.*']" in report["reason"]


# A stand-in for pip that needs a moment, so that two starts install at once, and counts its calls.
_PIP = """
import os, pathlib, sys, time
target = pathlib.Path(sys.argv[sys.argv.index("--target") + 1])
listed = pathlib.Path(sys.argv[sys.argv.index("-r") + 1]).read_text()
count = pathlib.Path(os.environ["COUNT"])
(count / target.name).write_text(listed)
if os.environ.get("FAIL"):
    print("ERROR: no matching distribution")
    sys.exit(3)
# Until the others have begun, too.
deadline = time.monotonic() + 20
while len(list(count.iterdir())) < int(os.environ.get("TOGETHER", "1")) and time.monotonic() < deadline:
    time.sleep(0.01)
(target / "wanted.py").write_text("VALUE = 42")
"""


def wanted() -> Any:
    import pathlib
    import subprocess
    import sys

    import wanted as found  # type: ignore[import-not-found]

    code = "import wanted; print(wanted.VALUE)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return [found.VALUE, child.strip(), pathlib.Path(found.__file__).parent.name]


def installing(folder: Path, cache: Path, requirements: tuple[str, ...] = ("wanted==1",)) -> dict[str, str]:
    """Write a call with requirements and return the environment in which a stand-in for pip installs them."""
    FunctionCall.pack(wanted, requirements=requirements, cache_dir=str(cache)).write(folder, KEY)
    packages, count = cache.parent / "packages", cache.parent / "count"
    for each in (packages, count):
        each.mkdir(exist_ok=True)
    (packages / "pip.py").write_text(_PIP)
    return {"PYTHONPATH": str(packages), "COUNT": str(count), "PATH": "/usr/bin:/bin"}


def test_requirements_are_installed_once(tmp_path: Path) -> None:
    cache, count = tmp_path / "cache", tmp_path / "count"
    for number in (1, 2):
        environment = installing(tmp_path / f"start-{number}", cache)
        status, (report,), output = start(tmp_path / f"start-{number}", **environment)
        assert (status, report["value"][:2]) == (0, [42, "42"]), output
        assert [each.name for each in cache.iterdir()] == [report["value"][2]]
        assert len(list(count.iterdir())) == 1
    assert "The requirements are in" in output
    environment = installing(tmp_path / "other", cache, ("wanted==2",))
    assert start(tmp_path / "other", **environment)[0] == 0
    assert len(list(cache.iterdir())) == len(list(count.iterdir())) == 2


def test_two_starts_may_install_at_once(tmp_path: Path) -> None:
    found: list[Any] = []

    def run(number: int) -> None:
        environment = installing(tmp_path / f"start-{number}", tmp_path / "cache")
        found.append(start(tmp_path / f"start-{number}", **environment, TOGETHER="2"))

    threads = [threading.Thread(target=run, args=[number]) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(status, report["state"]) for status, (report,), _ in found] == [(0, "returned")] * 2
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert len(list((tmp_path / "count").iterdir())) == 2


def test_a_failed_installation_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    environment = installing(tmp_path / "start", tmp_path / "cache")
    status, (report,), _ = start(tmp_path / "start", **environment, FAIL="1")
    assert (status, report["state"], report["type"]) == (1, "raised", "RequirementsError")
    assert report["message"] == "requirements: pip ended with exit status 3: ERROR: no matching distribution"
    assert report["traceback"] == ["ERROR: no matching distribution"]
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_old_installation_that_was_killed_is_removed(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name, age in (("old.1-1.tmp", 2 * 24 * 3600), ("new.1-1.tmp", 0)):
        (cache / name).mkdir(parents=True)
        at = (cache / name).stat().st_mtime - age
        os.utime(cache / name, (at, at))
    environment = installing(tmp_path / "start", cache)
    assert start(tmp_path / "start", **environment)[0] == 0
    assert sorted(each.name for each in cache.iterdir() if each.suffix) == ["new.1-1.tmp"]


def test_a_cache_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    FunctionCall.pack(double, [1], requirements=["a"], cache_dir=str(tmp_path / "file" / "x")).write(
        tmp_path / "start", KEY
    )
    _, (report,), _ = start(tmp_path / "start")
    assert report["reason"].startswith("cache_dir: expected a folder that the run can make, got")


def test_an_image_without_an_installer_is_reported(tmp_path: Path) -> None:
    environment = installing(tmp_path / "start", tmp_path / "cache")
    (tmp_path / "packages" / "pip.py").unlink()
    python = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", python], check=True)
    _, (report,), _ = start(tmp_path / "start", python=str(python / "bin" / "python"), **environment)
    assert report["reason"].startswith("requirements: expected uv or pip in the run, and its Python")
