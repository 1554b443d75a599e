"""Call one function inside a run and report what became of it: the only file of this room that runs there.

``python3 main.py`` beside ``call.json``, which it removes. Needs Python 3.8 and nothing else.

The order: read and remove ``call.json``, compare versions, install the requirements, then call the function,
in this process or in those of torchrun. Whatever happens is reported as one line of the log, a message of
kind "function" in the format of docs/report-protocol.md, whose key sets it apart from what the function
itself may print.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import hashlib
import importlib.util
import inspect
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import sysconfig
import time
import traceback
import types
import zlib
from typing import Any, Callable

# A terminal takes 4096 bytes at once, so no other process's output can land inside of a part. With longer
# parts, a result comes back broken.
_PART = 3000
# Of at most 500 characters each: the error of a task is kept in the database of its engine.
_TRACEBACK_LINES = 20
_LINE_LENGTH = 500
# An installation that was killed leaves its folder behind. No installation takes a day, so an older one has
# ended.
_STALE_SECONDS = 24 * 3600
# The port that torchrun itself uses by default.
_MASTER_PORT = "29500"
# Names the call of each process that torchrun starts.
_WORKER = "--worker"


class Unusable(Exception):
    """A reason why this call cannot work as it is, however often it is tried."""


class NotInstalled(Exception):
    """Requirements that could not be installed; ``lines`` are the last ones of the installer."""

    def __init__(self, message: str, lines: list[str]) -> None:
        super().__init__(message)
        self.lines = lines


def main() -> int:
    """Make the call and return the exit status."""
    # The function may close or replace its standard output.
    out = os.dup(1)
    here = os.path.dirname(os.path.abspath(__file__))
    is_worker = _WORKER in sys.argv
    # Before the function is called, which may set such variables for its own processes.
    first = os.environ.get("RANK" if is_worker else "DSTACK_NODE_RANK", "0") == "0"
    name = "call-{}.json".format(os.environ.get("LOCAL_RANK", "0")) if is_worker else "call.json"
    path = os.path.join(here, name)
    with open(path, encoding="utf-8") as file:
        call = json.load(file)
    try:
        remove(path)
        add_paths(call, here, is_worker)
        if call.get("torchrun") and not is_worker:
            return start_torchrun(call, here)
    except Unusable as error:
        report(out, call, {"state": "unusable", "reason": str(error)})
        return 1
    except NotInstalled as error:
        content = {"type": "RequirementsError", "message": str(error), "traceback": error.lines}
        report(out, call, {"state": "raised", **content})
        return 1
    return carry_out(out, call, here, first)


def remove(path: str) -> None:
    """Remove the call: it may hold secrets, which the programs that a function starts must not find."""
    try:
        os.remove(path)
    except OSError as error:
        raise Unusable(
            "{}: expected a file that the run's user can remove, got {!r}. Run as a user who can write to "
            "the home directory.".format(path, error)
        ) from None


def carry_out(out: int, call: dict[str, Any], here: str, first: bool) -> int:
    """Call the function, report what it returned or raised, and return the exit status.

    Only the ``first`` of several processes returns a result; each reports an error.
    """
    try:
        function, args, kwargs = read_call(call, here)
        value = function(*args, **kwargs)
        if inspect.isawaitable(value):
            # Slow to import, and the machine that packs the call imports this file, too.
            import asyncio

            value = asyncio.run(_awaited(value))
        if first:
            report(out, call, {"state": "returned", **dump(value, call)})
    except Unusable as error:
        report(out, call, {"state": "unusable", "reason": str(error)})
        return 1
    except BaseException as error:
        # A SystemExit itself.
        if is_skip(error):
            if first:
                report(out, call, {"state": "skipped", "reason": text_of(error)})
            return 0
        if isinstance(error, SystemExit):
            return exit_with(out, call, error.code, first)
        lines = print_traceback()
        kind = type(error)
        name = (
            kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        )
        content = {"type": name, "message": text_of(error), "traceback": lines}
        report(out, call, {"state": "raised", **content})
        return 1
    return 0


def exit_with(out: int, call: dict[str, Any], code: Any, first: bool) -> int:
    """Report a ``sys.exit(code)`` of the function and return the exit status, as Python itself reads it."""
    if code is None or code == 0:
        if first:
            report(out, call, {"state": "returned", **dump(None, call)})
        return 0
    status = code if isinstance(code, int) else 1
    if status is not code:
        sys.stderr.write(f"{code}\n")
    report(out, call, {"state": "exited", "status": status, "message": "" if status is code else str(code)})
    return status


async def _awaited(value: Any) -> Any:
    return await value


def is_skip(error: BaseException) -> bool:
    """Return whether ``dstack_report.skip`` raised the error."""
    return any(
        each.__name__ == "Skipped" and "dstack_report" in each.__module__ for each in type(error).__mro__
    )


def text_of(error: BaseException) -> str:
    """Return the message of an error."""
    reason = getattr(error, "reason", None) if is_skip(error) else None
    try:
        return reason if isinstance(reason, str) else str(error)
    except Exception as second:
        return "its message could not be read: {!r}".format(type(second))


def read_call(call: dict[str, Any], here: str) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
    """Return the function and its arguments."""
    if call["serializer"] == "cloudpickle":
        check_cloudpickle(call["cloudpickle"], call["python"])
        function, args, kwargs = pickle.loads(base64.b64decode(call["pickle"]))
        return function, args, kwargs
    path = os.path.join(here, "source", "dstack_function.py")
    with open(path, encoding="utf-8") as file:
        source = file.read()
    # A module of its own, so that what is pickled by name, such as for a worker process of the function, is
    # found again.
    module = types.ModuleType("dstack_function")
    module.__file__ = path
    sys.modules["dstack_function"] = module
    # The first line of the source makes annotations text: they may name what only the caller imports.
    exec(compile(source, path, "exec", dont_inherit=True), module.__dict__)
    return getattr(module, call["name"]), call["args"], call["kwargs"]


def check_python(wanted: str) -> None:
    """Raise ``Unusable`` where bytecode of Python ``wanted`` would not work."""
    here = "{}.{}".format(*sys.version_info)
    if here != wanted:
        raise Unusable(
            f"expected Python {wanted} in the run, which pickled the function, got Python {here}. Set "
            f"python={wanted!r} or another image, or use serializer='json'."
        )


def check_cloudpickle(wanted: str, python: str) -> None:
    """Raise ``Unusable`` where there is no cloudpickle, or one of another minor version."""
    advice = f"Add requirements=['cloudpickle=={wanted}.*'], or use an image that has it."
    try:
        found = str(__import__("cloudpickle").__version__)
    except ImportError:
        raise Unusable(
            f"serializer: expected the package cloudpickle in the run, and its Python {python} has none. "
            f"{advice}"
        ) from None
    if found.split(".")[:2] != wanted.split("."):
        raise Unusable(
            f"serializer: expected cloudpickle {wanted} in the run, which pickled the function, got {found}. "
            f"{advice}"
        )


def add_paths(call: dict[str, Any], here: str, is_worker: bool) -> None:
    """Check the version of Python, install the requirements, and put what was delivered on ``sys.path``.

    Also on PYTHONPATH, for the processes that the function starts.
    """
    if call["serializer"] == "cloudpickle":
        check_python(call["python"])
    # The folder of this file, in which ``main`` could hide a module of that name.
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != here or not path]
    added = [
        os.path.join(here, name) for name in ("modules", "source") if os.path.isdir(os.path.join(here, name))
    ]
    if call.get("requirements") and not is_worker:
        added.append(installed(call["requirements"], call.get("cache_dir"), here))
    if is_worker:
        # They are on the PYTHONPATH of its launcher.
        return
    sys.path[:0] = added
    given = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*added, *([given] if given else [])])


def installed(requirements: str, cache_dir: str | None, here: str) -> str:
    """Return the folder that has the requirements; what an earlier start installed is used again.

    Each start installs into a folder of its own and renames it at the end, so a folder under the final name
    is complete, whichever start made it. Of two that install at once the second one to finish uses the folder
    of the first.
    """
    given = cache_dir or os.environ.get("DSTACK_FUNCTION_CACHE") or "~/.cache/dstack-functions"
    cache = os.path.abspath(os.path.expanduser(given))
    folder = os.path.join(cache, cache_key(requirements))
    if os.path.isdir(folder):
        print(f"The requirements are in {folder}.", flush=True)
        return folder
    try:
        os.makedirs(cache, exist_ok=True)
    except OSError as error:
        raise Unusable(
            f"cache_dir: expected a folder that the run can make, got {cache!r} ({error.strerror}). Pass "
            "another one, such as the path of a mounted volume."
        ) from None
    remove_stale(cache)
    own = f"{folder}.{os.getpid()}-{random.getrandbits(32):08x}.tmp"
    began = time.monotonic()
    try:
        install(requirements, own, here)
        try:
            os.rename(own, folder)
        except OSError:
            # Another start was quicker.
            if not os.path.isdir(folder):
                raise
    finally:
        shutil.rmtree(own, ignore_errors=True)
    print(f"Installed the requirements into {folder} in {time.monotonic() - began:.0f} s.", flush=True)
    return folder


def cache_key(requirements: str) -> str:
    """Return the name of the folder that these requirements have with this Python on this platform."""
    # SOABI has the C library, too: a wheel for musl does not work with glibc.
    python = "{}.{}".format(*sys.version_info)
    parts = [requirements, python, sysconfig.get_platform(), str(sysconfig.get_config_var("SOABI"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def remove_stale(cache: str) -> None:
    """Remove the folders of installations that were killed."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(cache):
            if entry.name.endswith(".tmp") and entry.stat().st_mtime < time.time() - _STALE_SECONDS:
                shutil.rmtree(entry.path, ignore_errors=True)


def install(requirements: str, target: str, here: str) -> None:
    """Install into ``target`` with uv if the image has it, else with pip; the output goes to the log."""
    os.makedirs(target)
    listed = os.path.join(here, "requirements.txt")
    with open(listed, "w", encoding="utf-8") as file:
        file.write(requirements)
    uv = shutil.which("uv")
    if uv:
        command = [uv, "pip", "install", "--python", sys.executable]
    elif importlib.util.find_spec("pip"):
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command += ["--root-user-action", "ignore"]
    else:
        raise Unusable(
            "requirements: expected uv or pip in the run, and its Python {}.{} has neither. Use an image "
            "that has one.".format(*sys.version_info)
        )
    command += ["--target", target, "-r", listed]
    # Relative paths of wheels in the requirements begin here.
    last: collections.deque[str] = collections.deque(maxlen=_TRACEBACK_LINES)
    with subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout or ():
            text = line.decode("utf-8", "replace").rstrip()
            print(text, flush=True)
            last.append(text[:_LINE_LENGTH])
    if process.returncode:
        end = next((line for line in reversed(last) if line.strip()), "")
        raise NotInstalled(
            "requirements: {} ended with exit status {}: {}".format(
                "uv" if uv else "pip", process.returncode, end.strip()
            ),
            list(last),
        )


def start_torchrun(call: dict[str, Any], here: str) -> int:
    """Start the function once a GPU under torchrun and return its exit status."""
    environ = os.environ
    processes = max(1, int(environ.get("DSTACK_GPUS_PER_NODE") or 0))
    if importlib.util.find_spec("torch"):
        command = [sys.executable, "-m", "torch.distributed.run"]
    elif shutil.which("torchrun"):
        command = ["torchrun"]
    else:
        raise Unusable(
            "torchrun: expected the package torch in the run, got none. Use an image that has it, or add it "
            "to requirements."
        )
    # Each process removes its own before it calls the function.
    calls = [os.path.join(here, f"call-{rank}.json") for rank in range(processes)]
    for path in calls:
        with open(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump(call, file)
    nodes, master = (
        environ.get("DSTACK_NODES_NUM") or "1",
        environ.get("DSTACK_MASTER_NODE_IP") or "127.0.0.1",
    )
    command += ["--nnodes", nodes, "--node-rank", environ.get("DSTACK_NODE_RANK") or "0"]
    command += ["--nproc-per-node", str(processes), "--master-addr", master, "--master-port", _MASTER_PORT]
    try:
        process = subprocess.Popen([*command, os.path.abspath(__file__), _WORKER])
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                # It got the same signal, and ends its processes.
                continue
    finally:
        for path in calls:
            with contextlib.suppress(OSError):
                os.remove(path)


def dump(value: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Return the result as what a message can carry: itself, its text, or the text of its pickle."""
    if call["serializer"] == "cloudpickle":
        try:
            value = base64.b64encode(__import__("cloudpickle").dumps(value)).decode()
        except Exception as error:
            raise Unusable(f"the result: expected what can be pickled, got {error}.") from None
        found, size = {"value": value}, len(value)
    else:
        problem = not_json(value, "the result")
        if problem:
            raise Unusable(
                f"{problem}. Return None, bool, int, float, str, lists and dicts (with str keys) of them, "
                "or use serializer='cloudpickle'."
            )
        text = json.dumps(value)
        size = len(text)
        try:
            json.dumps(value, allow_nan=False)
            found = {"value": value}
        except ValueError:
            # JSON has no NaN, and the reader of the log refuses messages with it. Python reads it back.
            found = {"text": text}
    if size > call["limit"]:
        raise Unusable(
            f"the result: expected at most {call['limit']} bytes (max_result_bytes), got {size}. Write "
            "what is big to a volume or a bucket, and return where it is."
        )
    return found


def not_json(value: Any, where: str) -> str | None:
    """Return what of a value JSON would lose; None when nothing."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return None
    if isinstance(value, (list, tuple)):
        items = [(f"{where}[{index}]", item) for index, item in enumerate(value)]
    elif isinstance(value, dict):
        odd = [key for key in value if not isinstance(key, str)]
        if odd:
            return f"{where}: expected str keys, got {odd[0]!r}"
        items = [(f"{where}[{key!r}]", item) for key, item in value.items()]
    else:
        return f"{where}: expected a value that JSON can carry, got {type(value).__name__}"
    problems = (not_json(item, place) for place, item in items)
    return next((problem for problem in problems if problem), None)


def print_traceback() -> list[str]:
    """Print the traceback of the function, without the lines of this file; return its end."""
    kind, error, trace = sys.exc_info()
    while trace is not None and trace.tb_frame.f_code.co_filename == main.__code__.co_filename:
        trace = trace.tb_next
    text = "".join(traceback.format_exception(kind, error, trace))
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.write(text)
        sys.stderr.flush()
    return [line[:_LINE_LENGTH] for line in text.rstrip().split("\n")[-_TRACEBACK_LINES:]]


def report(out: int, call: dict[str, Any], content: dict[str, Any]) -> None:
    """Write what became of the call to the log, each line at once."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    for line in report_lines(call["key"], content):
        data = f"{line}\n".encode()
        while data:
            data = data[os.write(out, data) :]


def report_lines(key: str, content: dict[str, Any]) -> list[str]:
    """Return the lines of a message: one, or the parts of a long one."""
    # ASCII without line ends, so that each character is a byte and no part ends inside of one.
    text = json.dumps({"kind": "function", "key": key, **content})
    if len(text) <= _PART:
        return [f"::dstack::{text}"]
    name, check = f"f{random.getrandbits(64):016x}", cksum(text.encode())
    parts = [text[start : start + _PART] for start in range(0, len(text), _PART)]
    return [f"::dstack:{name}:{n}/{len(parts)}:{check}:{part}" for n, part in enumerate(parts, 1)]


def cksum(data: bytes) -> int:
    """Return what the command ``cksum`` of POSIX prints."""
    # It reads each byte from its highest bit on, zlib from its lowest.
    reverse = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
    length = len(data).to_bytes((len(data).bit_length() + 7) // 8, "little")
    return int("{:032b}".format(zlib.crc32((data + length).translate(reverse), 0xFFFFFFFF))[::-1], 2)


if __name__ == "__main__":
    sys.exit(main())
