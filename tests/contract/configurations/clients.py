"""Both clients on the same file: what each would send, and where they differ.

A run spec is compared as a server of 0.22.5 reads it, because the same value may be written in several ways: a size
as text or as a number, a default left out or sent. The comparison leaves out

* `ssh_key_pub`: ours sends the user's key, the official client lets the server fill in the same one;
* `configuration_path`: ours keeps the run's marker there;
* `run_name` where none is given: ours draws one, the official client leaves that to the server;
* `configuration.name`: ours sends the name as `run_name` alone, which is the one that the server reads;
* `working_dir` beside the configuration, which servers since 0.19.27 ignore;
* the ids of uploaded archives: each client packs in its own way.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from unittest import mock

import dstack_core as dstack
from dstack_core._wire.http_messages import Reply, Request
from tests.rig.server_process import server_python

JUDGE_VERSION = "0.22.5"
_SCRIPT = Path(__file__).with_name("official_client.py")
_ARCHIVE = "00000000-0000-4000-8000-000000000000"
_PRIVATE = ("ssh_key_pub", "configuration_path", "working_dir")


@dataclass(frozen=True)
class Case:
    """A `.dstack.yml` and the arguments and variables that the user passes with it."""

    text: str
    env: Mapping[str, str] = field(default_factory=dict)
    args: Sequence[str] = ()
    profile: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    profiles: str | None = None

    def in_environment(self) -> AbstractContextManager[Any]:
        """Set the case's environment variables in this process."""
        return mock.patch.dict(os.environ, self.environment)


@dataclass(frozen=True)
class Answer:
    """The run spec that a client sends, or the reason why it refuses."""

    spec: dict[str, Any] | None = None
    refusal: str | None = None


class OfficialClient:
    """The official client as a process with the home directory `home`."""

    def __init__(self, home: Path) -> None:
        self._process = subprocess.Popen(
            [str(server_python(JUDGE_VERSION)), "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"HOME": str(home), "PATH": os.defpath, "LANG": "C.UTF-8"},
        )
        self._next_line()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def send(self, path: Path, case: Case) -> Answer:
        """Return what the official client sends for the file."""
        arguments = [part for name, value in case.env.items() for part in ("-e", f"{name}={value}")]
        arguments += ["--profile", case.profile] if case.profile else []
        arguments += ["--", *case.args] if case.args else []
        return self._ask({"send": str(path), "arguments": arguments, "environment": dict(case.environment)})

    def read(self, spec: Mapping[str, Any]) -> Answer:
        """Return a spec as a server reads it, and the resulting profile."""
        answer = self._question({"read": spec})
        if "refused" in answer:
            return Answer(refusal=answer["refused"])
        return Answer(answer["spec"] | {"merged_profile": answer["profile"]})

    def schema(self, kind: str) -> dict[str, Any]:
        """Return the JSON schema of a type of configuration."""
        found: dict[str, Any] = self._question({"schema": kind})["schema"]
        return found

    def _ask(self, question: dict[str, Any]) -> Answer:
        answer = self._question(question)
        return Answer(answer.get("spec"), answer.get("refused"))

    def _question(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._next_line()

    def _next_line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the official client has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer


class _Recorder:
    """A server that records the run spec of a submit."""

    def __init__(self, version: str) -> None:
        self.spec: dict[str, Any] | None = None
        self._replies: dict[str, Any] = {
            "get_info": {"server_version": version},
            "get_my_user": {"username": "admin", "ssh_public_key": "ssh-ed25519 AAAA test"},
            "get_archive_by_hash": {"id": _ARCHIVE},
            "upload_archive": {"id": _ARCHIVE},
        }

    def __call__(self, request: Request) -> Reply:
        name = request.path.partition("?")[0].rpartition("/")[2]
        if name == "apply":
            self.spec = json.loads(request.body or b"")["plan"]["run_spec"]
            run = {
                "id": "1",
                "status": "submitted",
                "submitted_at": "2026-11-26T00:00:00Z",
                "run_spec": self.spec,
            }
            return Reply(200, {}, json.dumps(run).encode())
        return Reply(200, {}, json.dumps(self._replies.get(name, {})).encode())


def options_of(case: Case) -> dict[str, Any]:
    """Return the parameters of our client for what the user passes with the file."""
    given = {"env": case.env, "args": case.args, "profile": case.profile}
    return {name: value for name, value in given.items() if value}


def ours(path: Path, case: Case) -> Answer:
    """Return what our client sends for the file."""
    recorder = _Recorder(JUDGE_VERSION)
    client = dstack.Client(server_url="http://127.0.0.1:9", project_name="main", user_token="t")
    client._transport = recorder  # type: ignore[assignment]
    with case.in_environment():
        try:
            client.runs.submit(path, verify_ports=False, **options_of(case))
        except dstack.ConfigurationError as error:
            return Answer(refusal=error.message)
    return Answer(recorder.spec)


@contextmanager
def written(case: Case, folder: Path) -> Iterator[Path]:
    """Write the case's files; the configuration is in the current directory, as it is for `dstack apply`."""
    path = folder / ".dstack.yml"
    path.write_text(case.text)
    profiles = folder / ".dstack" / "profiles.yml"
    if case.profiles is not None:
        profiles.parent.mkdir(exist_ok=True)
        profiles.write_text(case.profiles)
    try:
        yield path
    finally:
        profiles.unlink(missing_ok=True)


def differences(case: Case, folder: Path, official: OfficialClient) -> list[str]:
    """Return the differences between what both clients send, in words; an empty list if they agree.

    A refusal by the client counts the same as one by the server.
    """
    with written(case, folder) as path:
        theirs, own = official.send(path, case), ours(path, case)
    their_reading = theirs if theirs.spec is None else official.read(theirs.spec)
    own_reading = own if own.spec is None else official.read(own.spec)
    if their_reading.spec is None or own_reading.spec is None:
        if their_reading.spec is None and own_reading.spec is None:
            return []
        return [f"theirs: {_in_short(their_reading)}, ours: {_in_short(own_reading)}"]
    return compared(their_reading.spec, own_reading.spec)


def compared(theirs: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Return the differences between two run specs that a server has read, in words."""
    ignored = _PRIVATE if theirs["run_name"] is not None else (*_PRIVATE, "run_name")
    return list(_compared(_comparable(theirs, ignored), _comparable(own, ignored)))


def _comparable(spec: Mapping[str, Any], ignored: Sequence[str]) -> dict[str, Any]:
    """Return a spec that a server has read, without what may differ."""
    configuration = {key: value for key, value in spec["configuration"].items() if key != "name"}
    rest = {key: value for key, value in spec.items() if key not in ignored}
    archives = [{"path": archive["path"]} for archive in spec["file_archives"]]
    return rest | {"configuration": configuration, "file_archives": archives}


def _in_short(answer: Answer) -> str:
    return "taken" if answer.spec is not None else f"refused ({answer.refusal})"


def _compared(theirs: Any, own: Any, where: str = "") -> Iterator[str]:
    if isinstance(theirs, dict) and isinstance(own, dict):
        for key in sorted(theirs.keys() | own.keys()):
            yield from _compared(theirs.get(key), own.get(key), f"{where}.{key}".lstrip("."))
    elif theirs != own:
        yield f"{where}: theirs {theirs!r}, ours {own!r}"
