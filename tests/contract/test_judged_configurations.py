"""The embedded server accepts, refuses and stores the same as the models of the real server."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dstack_core.local.checks import check_spec, with_defaults
from dstack_core.local.errors import ApiError, ServerBugError
from dstack_core.local.specs import RunSpec
from tests.contract.configuration_forms import run_specs
from tests.rig.server_process import DEFAULT_VERSION, server_python

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(DEFAULT_VERSION != "0.22.5", reason="the embedded server speaks like 0.22.5"),
]


def _stored(data: Any) -> Any:
    try:
        spec = RunSpec.model_validate(data)
        check_spec(spec)
        return with_defaults(spec, "ssh-rsa KEY").model_dump(mode="json")
    except (ValidationError, ApiError, ServerBugError):
        return None


def test_every_form_is_accepted_or_refused_as_by_the_real_server() -> None:
    specs = list(run_specs())
    judge = [str(server_python(DEFAULT_VERSION)), str(Path(__file__).with_name("judge.py"))]
    done = subprocess.run(
        judge, input=json.dumps(specs), capture_output=True, text=True, timeout=280, check=True
    )
    judged = json.loads(done.stdout)
    assert len(judged) == len(specs) > 2000
    assert 0.3 < sum(one is not None for one in judged) / len(judged) < 0.7, "both kinds occur"
    wrong = []
    for data, expected in zip(specs, judged, strict=True):
        ours = _stored(data)
        if (ours is None) != (expected is None):
            wrong.append(f"{'refused' if ours is None else 'taken'} here: {data}")
        elif ours != expected:
            wrong.append(f"stored otherwise: {data}: {_differences(ours, expected)}")
    assert not wrong, f"{len(wrong)} of {len(specs)}:\n" + "\n".join(wrong[:200])


def _differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = sorted({*ours, *theirs})
        return [
            line for key in keys for line in _differences(ours.get(key), theirs.get(key), f"{path}.{key}")
        ]
    return [] if ours == theirs else [f"{path}: {ours!r} instead of {theirs!r}"]
