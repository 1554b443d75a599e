"""A value of every submit option that is not its default, in a form that work pools accept as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VALUES: dict[str, Any] = {
    "resources": {"gpu": "24GB.."},
    "spot_policy": "spot",
    "retry_policy": {"on_events": ["no-capacity"], "duration": "1h"},
    "max_duration": "2h",
    "max_price": 1.5,
    "working_dir": "src",
    "backends": ["aws"],
    "env": {"GIVEN": "yes"},
    "args": ["--epochs", "3"],
    "profile": "cheap",
    "reports": True,
    "survive": {"duration": "4h", "times": 3},
    "max_cost": 20.0,
    "tags": {"team": "ml"},
    "debug_on_failure": "30m",
}
# All options, each visible in what is sent.
CONFIGURATION: dict[str, Any] = {"type": "task", "commands": ["train ${{ run.args }}"]}


def write_profiles(folder: Path) -> Path:
    """Write the file with the profile of ``VALUES`` below ``folder`` and return its path."""
    path = folder / ".dstack" / "profiles.yml"
    path.parent.mkdir()
    path.write_text("profiles: [{name: cheap, max_price: 2}]\n")
    return path
