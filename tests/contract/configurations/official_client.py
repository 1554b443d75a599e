"""The judge: dstack's own client, in the Python of the server's environment, as a process that answers lines.

Each line of its input is a JSON object, and so is each line of its output:

* ``{"send": path, "arguments": [...], "environment": {...}}`` loads the file and applies the arguments as
  ``dstack apply`` does, up to the request for a plan. The answer is ``{"spec": ...}``, the run spec in that request
  as it is sent, or ``{"refused": text}``.
* ``{"read": spec}`` returns the run spec as a server of this version reads it, with its defaults filled in, and the
  resulting profile; or ``{"refused": text}``.
* ``{"schema": type}`` returns the JSON schema of that configuration.

Nothing is sent over the network: the request of the client ends here.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

_DSTACK = "dstack._internal"
_KEY = "ssh-ed25519 AAAA test"
# Stands for the id that a server assigns to an uploaded archive.
_ARCHIVE = "00000000-0000-4000-8000-000000000000"


class _PlanRequested(Exception):
    """The client's request for a plan, with its body."""


def _load(module: str) -> Any:
    return importlib.import_module(f"{_DSTACK}.{module}")


class Judge:
    """The parts of dstack that read, fill in and check a configuration."""

    def __init__(self) -> None:
        self._configurators = _load("cli.services.configurators")
        self._configurations = _load("core.models.configurations")
        self._runs = _load("core.models.runs")
        self._errors = (
            _load("core.errors").DstackError,
            importlib.import_module("pydantic").ValidationError,
            # An error that the validator does not handle; the official client ends with a traceback.
            ValueError,
            TypeError,
            AttributeError,
            OSError,
        )
        self._defaults = _load("server.services.runs.spec").validate_run_spec_and_set_defaults
        self._api_client = importlib.import_module("dstack.api.server").APIClient(
            "http://127.0.0.1:9", "token"
        )
        self._api_client._request = self._request
        self._client = importlib.import_module("dstack.api._public").Client(
            api_client=self._api_client, project_name="main"
        )

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """Answer one line."""
        try:
            if "send" in question:
                return {"spec": self._send(**question)}
            if "read" in question:
                return self._read(question["read"])
            return {"schema": self._schema(question["schema"])}
        except SystemExit as error:
            return {"refused": f"exit {error.code}"}
        except self._errors as error:
            return {"refused": f"{type(error).__name__}: {error}"}

    def _send(self, send: str, arguments: list[str], environment: dict[str, str]) -> Any:
        os.chdir(Path(send).parent)
        with mock.patch.dict(os.environ, environment):
            path, configuration = self._configurators.load_apply_configuration(Path(send).name)
            configurator = self._configurators.get_run_configurator_class(configuration.type)(self._client)
            options = configurator.get_parser().parse_args(arguments)
            try:
                configurator.get_plan(configuration, path, options, None)
            except _PlanRequested as request:
                return json.loads(request.args[0])["run_spec"]
        raise AssertionError("the client did not request a plan")

    def _read(self, spec: dict[str, Any]) -> dict[str, Any]:
        read = self._runs.RunSpec.model_validate(spec)
        self._defaults(types.SimpleNamespace(ssh_public_key=_KEY), read)
        return {
            "spec": json.loads(read.model_dump_json()),
            "profile": json.loads(read.merged_profile.model_dump_json()),
        }

    def _schema(self, kind: str) -> Any:
        models = {
            "task": "TaskConfiguration",
            "service": "ServiceConfiguration",
            "dev-environment": "DevEnvironmentConfiguration",
        }
        return getattr(self._configurations, models[kind]).model_json_schema()

    def _request(self, path: str, body: Any = None, **_: Any) -> Any:
        if path.endswith("/runs/get_plan"):
            raise _PlanRequested(body)
        reply = {"id": _ARCHIVE, "hash": "0" * 64} if path.endswith("/upload_archive") else {}
        return types.SimpleNamespace(json=lambda: reply)


def main() -> None:
    """Answer each line of standard input until its end."""
    answers = sys.stdout
    judge = Judge()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        # The client prints messages for its user, which must not mix with the answers.
        with contextlib.redirect_stdout(io.StringIO()):
            answer = judge.answer(json.loads(line))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
