"""The rig runs the part of a command that is meant for this machine, not for a container."""

from __future__ import annotations

import pytest

from tests.rig.command import UnsafeCommandError, without_preamble

SETUP = "uv venv -q --prompt dstack --seed /dstack/venv && . /dstack/venv/bin/activate && "


def test_the_setup_of_the_default_image_is_left_out() -> None:
    assert without_preamble(["/bin/bash", "-c", f"{SETUP}echo hi"], default_image=True)[-1] == "echo hi"


@pytest.mark.parametrize("script", ["echo hi > /dstack/x", "X=/dstack/x true", 'cat "/dstack/x"'])
def test_refuses_to_write_into_the_containers_folder(script: str) -> None:
    with pytest.raises(UnsafeCommandError):
        without_preamble(["/bin/bash", "-c", SETUP + script], default_image=True)


@pytest.mark.parametrize("script", ["/home/me/dstack/.venv/bin/python", "cd ./dstack/x", "cd ~/dstack/x"])
def test_another_folder_of_that_name_may_be_used(script: str) -> None:
    assert without_preamble(["/bin/bash", "-c", SETUP + script], default_image=True)[-1] == script
