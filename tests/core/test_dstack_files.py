"""No configuration in use is refused, and none is changed except where we fill something in."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from dstack_core import parse_configuration
from dstack_core._wire.filling import fill_in
from dstack_core._wire.spec import run_spec
from dstack_core.models.options import SubmitOptions
from tests.dstack_files import ENV, FILES

# What is filled in, by file and key; everything else is sent as written.
CHANGED: dict[str, dict[str, Any]] = {
    "a fine-tuning with names of variables": {
        "python": "3.10",
        "env": {"HF_TOKEN": "hf_x", "WANDB_API_KEY": "w", "ACCELERATE_LOG_LEVEL": "info"},
        "commands": ["uv pip install -r requirements.txt", "python train.py --epochs 3"],
    },
    "a private image": {
        "env": {"NGC_API_KEY": "n", "NIM_MAX_MODEL_LEN": "4096"},
        "registry_auth": {"username": "$oauthtoken", "password": "n"},
    },
    "a service that scales": {
        "probes": [
            {
                "type": "http",
                "url": "/health",
                "method": "post",
                "headers": [{"name": "X-Key", "value": "llama"}],
                "interval": "15s",
                "ready_after": 2,
            }
        ]
    },
    "replicas of several kinds": {
        "replicas": [
            {
                "count": 1,
                "commands": ["python -m sglang_router --policy --epochs 3"],
                "resources": {"cpu": 4},
            },
            {
                "count": "1..4",
                "scaling": {"metric": "rps", "target": 3},
                "commands": ["python -m sglang.launch_server"],
                "resources": {"gpu": "H200"},
            },
        ]
    },
    "groups of replicas": {
        "groups": [
            {"name": "prefill", "replicas": 1, "python": "3.12", "commands": ["serve prefill"]},
            {"replicas": 2, "commands": ["serve decode"]},
        ]
    },
    "a dev environment": {"env": {"HF_TOKEN": "hf_x"}},
    "where and how long": {"max_price": 98.5},
    "numbers where a text is meant": {
        "commands": ["42", "1.5"],
        "env": {"PORT": "8000", "RATE": "0.5"},
        "nodes": 1,
    },
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_sent_as_it_is_written(name: str) -> None:
    filled = fill_in(parse_configuration(FILES[name]), env=None, args=["--epochs", "3"], environ=ENV)
    wire = run_spec(filled, SubmitOptions())["configuration"]
    written = yaml.safe_load(FILES[name])
    written.pop("name", None)
    assert wire == {**written, **CHANGED.get(name, {})}
