"""What the rig runs of a command that was made for a container."""

from __future__ import annotations

import pytest

from tests.rig.command import UnsafeCommandError, without_preamble

SETUP = "uv venv -q --prompt dstack --seed /dstack/venv && . /dstack/venv/bin/activate && "


def test_the_setup_of_the_default_image_is_left_out() -> None:
    assert without_preamble(["/bin/bash", "-c", f"{SETUP}echo hi"], default_image=True)[-1] == "echo hi"


@pytest.mark.parametrize("script", ["echo hi > /dstack/x", "X=/dstack/x true", 'cat "/dstack/x"'])
def test_what_would_write_into_the_containers_folder_is_refused(script: str) -> None:
    with pytest.raises(UnsafeCommandError):
        without_preamble(["/bin/bash", "-c", SETUP + script], default_image=True)


@pytest.mark.parametrize("script", ["/home/me/dstack/.venv/bin/python", "cd ./dstack/x", "cd ~/dstack/x"])
def test_another_folder_of_that_name_is_none_of_the_containers(script: str) -> None:
    assert without_preamble(["/bin/bash", "-c", SETUP + script], default_image=True)[-1] == script
