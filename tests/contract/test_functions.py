"""Functions in runs, on every server: their files are there, and values and errors come back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import dstack_core as dstack
from tests.contract.conftest import Target


def multiply(one: float, other: float) -> Any:
    import os
    import pathlib

    files = pathlib.Path("~/.dstack/function").expanduser()
    return [
        one * other,
        sorted(path.name for path in files.iterdir()),
        os.environ["DSTACK_NODE_RANK"],
        "x" * 10_000,
    ]


def fails() -> None:
    raise KeyError("no weight")


@pytest.fixture
def needs(target: Target) -> dict[str, Any]:
    return {"configuration": {"type": "task", **target.needs}, "poll_interval": target.poll_interval}


@pytest.fixture
def refused(target: Target, client: dstack.Client, needs: dict[str, Any]) -> bool:
    """Whether the server is too old for functions, which the client reports before it submits."""
    if target.release >= (0, 19, 17):
        return False
    with pytest.raises(dstack.UnsupportedServerError, match=r"files: needs dstack >= 0.19.17"):
        client.functions.run(multiply, 6, other=7, **needs)
    return True


def test_a_value_comes_back(client: dstack.Client, needs: dict[str, Any], refused: bool) -> None:
    if refused:
        return
    value, files, rank, large = client.functions.run(multiply, 6, other=7, **needs)
    assert (value, rank, large) == (42, "0", "x" * 10_000)
    assert files == [".dstackignore", "main.py", "source"]


def test_an_error_comes_back(target: Target, needs: dict[str, Any], refused: bool) -> None:
    if refused:
        return

    async def main() -> Any:
        async with target.async_client() as client:
            return await client.functions.run(fails, **needs)

    with pytest.raises(dstack.RemoteFunctionError) as caught:
        asyncio.run(main())
    assert (caught.value.type_name, caught.value.text) == ("KeyError", "'no weight'")
