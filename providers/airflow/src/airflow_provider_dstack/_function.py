"""Pack a Python function with its arguments for a run, and read back what it returned.

The way in: function and arguments travel as files in the uploaded code, together with ``_function_main.py``,
the program that calls the function. So they are neither in the run's configuration nor in a process list.

The way out: the log is all that a run returns. The program writes the result there as a frame, one or more
lines ``@@dstack:<key>:<part>/<parts>:<base64>@@`` whose content begins with its own checksum. The key, drawn
from the run's marker, keeps apart what the function itself may print. ``_log_relay`` keeps frames out of the
task's log.
"""

from __future__ import annotations

import ast
import base64
import binascii
import inspect
import json
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from airflow_provider_dstack import _function_main
from airflow_provider_dstack._log_relay import FRAME
from airflow_provider_dstack.errors import AirflowFailException, DstackError

if TYPE_CHECKING:
    from dstack_core import Client

Serializer = Literal["json", "cloudpickle"]

FOLDER = ".dstack-task"
# A log store may show the last lines some seconds after the run has ended. With fewer or quicker reads, a
# task fails although its function returned.
_READS = 4
_PAUSE_SECONDS = 2.0


def call_of(
    function: Callable[..., Any], args: Collection[Any], kwargs: Mapping[str, Any], serializer: Serializer
) -> dict[str, Any]:
    """Return the call as what ``call.json`` holds. Raises ``AirflowFailException`` for what cannot travel."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    head = {"serializer": serializer, "python": python, "name": function.__name__}
    if serializer == "cloudpickle":
        return {**head, "pickle": _pickled(function, args, kwargs)}
    plain_args, plain_kwargs = [_plain(value) for value in args], _plain(kwargs)
    places = [(f"argument {number}", value) for number, value in enumerate(plain_args, 1)]
    places += [(f"argument {name!r}", value) for name, value in plain_kwargs.items()]
    for place, value in places:
        problem = _function_main.not_json(value, place)
        if problem:
            raise AirflowFailException(
                f"{function.__name__}: {problem}. Arguments must be plain values; other ones need "
                "serializer='cloudpickle'."
            )
    return {
        **head,
        "source": source_of(function),
        "file": f"{function.__name__}.py",
        "args": plain_args,
        "kwargs": plain_kwargs,
    }


def source_of(function: Callable[..., Any]) -> str:
    """Return the text of a function from its ``def`` on, without decorators."""
    name = getattr(function, "__name__", repr(function))
    try:
        text = textwrap.dedent(inspect.getsource(function))
        found = next(node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef))
    except (OSError, SyntaxError, StopIteration) as error:
        raise AirflowFailException(
            f"{name}: expected a function whose source can be read, got an error ({error}). Write it as a "
            "def in the DAG's file, or use serializer='cloudpickle'."
        ) from None
    return "".join(text.splitlines(keepends=True)[found.lineno - 1 :])


def write_files(directory: Path, call: Mapping[str, Any], marker: str, limit: int) -> None:
    """Write what the run needs, ``limit`` being the most bytes it may return."""
    folder = directory / FOLDER
    folder.mkdir()
    content = {**call, "key": frame_key(marker), "limit": limit}
    source = content.pop("source", None)
    if source is not None:
        (folder / content["file"]).write_text(source, encoding="utf-8")
    (folder / "main.py").write_text(inspect.getsource(_function_main), encoding="utf-8")
    (folder / "call.json").write_text(json.dumps(content), encoding="utf-8")


def launcher(marker: str, image: str | None) -> str:
    """Return the shell command that starts the function, and reports when the run has no Python."""
    message = (
        f"expected python3 in {f'the image {image!r}' if image else 'the run'}, got none. "
        "Use an image that has it."
    )
    (frame,) = _function_main.frame(frame_key(marker), {"kind": "unusable", "message": message})
    script = f"{FOLDER}/main.py"
    return (
        "dstack_python=$(command -v python3 || command -v python) || "
        f"{{ echo {shlex.quote(message)}; echo {shlex.quote(frame)}; exit 127; }}; "
        f'dstack_main={script}; [ -e "$dstack_main" ] || '
        f'dstack_main="${{DSTACK_REPO_DIR:-/workflow}}/{script}"; "$dstack_python" -u "$dstack_main"'
    )


def read_back(client: Client, run_name: str, run_id: str, *, wait: bool) -> dict[str, Any] | None:
    """Return the frame in the run's log; with ``wait`` a late one is waited for, for some seconds.

    Raises the server errors, and ``DstackError`` for a frame that is broken.
    """
    for read in range(_READS if wait else 1):
        if read:
            time.sleep(_PAUSE_SECONDS)
        run = client.runs.get(run_name)
        if run is None or run.id != run_id:
            raise DstackError(f"Run {run_name} was deleted before its result was read.")
        try:
            frame = read_frame(run.logs(), frame_key(run.marker or ""))
        except ValueError as error:
            raise DstackError(f"Run {run_name}: {error}") from None
        if frame is not None:
            return frame
    return None


def value_of(frame: Mapping[str, Any], serializer: Serializer) -> Any:
    """Return what the function returned."""
    if serializer == "json":
        return json.loads(frame["value"])
    try:
        return _cloudpickle().loads(base64.b64decode(frame["value"]))
    except Exception as error:
        raise AirflowFailException(
            f"The function's result: expected what Python {sys.version.split()[0]} on the worker can "
            f"unpickle, got {error!r}."
        ) from error


def frame_key(marker: str) -> str:
    """Return the key of the frames of the run that carries ``marker``: 16 hex digits."""
    return sha256(f"frame {marker}".encode()).hexdigest()[:16]


def read_frame(chunks: Iterable[bytes], key: str) -> dict[str, Any] | None:
    """Return the content of the last whole frame with ``key`` in a log, or None.

    Keeps no more of the log in memory than one line and the frame. Raises ``ValueError`` for a frame that
    came broken.
    """
    parts: list[str] = []
    found: list[str] | None = None
    for line in _lines(chunks):
        for match in FRAME.finditer(line):
            its_key, part, total, data = match.groups()
            if its_key != key:
                continue
            if part == "1":
                parts = []
            parts.append(data)
            if part == total:
                found = parts if len(parts) == int(total) else []
    return None if found is None else _decoded(found)


def _pickled(function: Callable[..., Any], args: Collection[Any], kwargs: Mapping[str, Any]) -> str:
    cloudpickle = _cloudpickle()
    module = sys.modules.get(function.__module__)
    if module is not None:
        # The run cannot import the DAG's file.
        cloudpickle.register_pickle_by_value(module)
    try:
        data = cloudpickle.dumps((function, list(args), dict(kwargs)))
    except Exception as error:
        raise AirflowFailException(
            f"{function.__name__}: expected a function and arguments that can be pickled, got {error!r}."
        ) from error
    finally:
        if module is not None:
            cloudpickle.unregister_pickle_by_value(module)
    return base64.b64encode(data).decode()


def _cloudpickle() -> Any:
    try:
        return import_module("cloudpickle")
    except ImportError:
        raise AirflowFailException(
            "serializer: expected the package cloudpickle on the worker, got none. Install "
            "'airflow-provider-dstack[cloudpickle]'."
        ) from None


def _plain(value: Any) -> Any:
    """Return lists and dicts for what is like one: XComs of mapped tasks come as lazy sequences."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        return [_plain(item) for item in value]
    return value


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", "replace")
    yield rest.decode("utf-8", "replace")


def _decoded(parts: list[str]) -> dict[str, Any]:
    content = None
    with suppress(binascii.Error, ValueError):
        digest, _, text = base64.b64decode("".join(parts), validate=True).partition(b"\n")
        if sha256(text).hexdigest().encode() == digest:
            content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("expected a whole result in its log, got a broken one.")
    return content
