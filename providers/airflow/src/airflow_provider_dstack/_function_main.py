"""Call one function inside a run and report what it returned: the only file of this package that runs there.

``python3 main.py`` beside ``call.json``, which it removes. Needs Python 3.7 and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import sys
import traceback
from typing import Any, Callable

# A terminal takes 4096 bytes at once, so no other process's output can land inside of a part. With longer
# parts, a result comes back broken.
_PART = 3000
# Of at most 500 characters each: the error of the task is kept in Airflow's database.
_TRACEBACK_LINES = 20


class Unusable(Exception):
    """A reason why this call cannot work as it is, however often it is tried."""


def main() -> int:
    """Do the call and return the exit status."""
    here = os.path.dirname(os.path.abspath(__file__))
    path = os.path.join(here, "call.json")
    with open(path, encoding="utf-8") as file:
        call = json.load(file)
    # It may hold secrets, which the programs that the function starts have no business with.
    os.remove(path)
    try:
        function, args, kwargs = read_call(call, here)
        value = function(*args, **kwargs)
        if os.environ.get("DSTACK_NODE_RANK", "0") == "0":
            write_frame(call["key"], {"kind": "result", "value": dump(value, call)})
    except Unusable as error:
        write_frame(call["key"], {"kind": "unusable", "message": str(error)})
        return 1
    except BaseException:
        write_frame(call["key"], {"kind": "raised", "traceback": print_traceback()})
        return 1
    return 0


def read_call(call: dict[str, Any], here: str) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
    """Return the function and its arguments."""
    if call["serializer"] == "cloudpickle":
        check_python(call["python"])
        function, args, kwargs = unpickle(call["pickle"])
        return function, args, kwargs
    path = os.path.join(here, call["file"])
    with open(path, encoding="utf-8") as file:
        source = file.read()
    names: dict[str, Any] = {"__name__": "__dstack_task__", "__file__": path}
    # Annotations may name what only the DAG file imports, so they stay text.
    exec(compile(source, path, "exec", __import__("__future__").annotations.compiler_flag), names)
    return names[call["name"]], call["args"], call["kwargs"]


def check_python(wanted: str) -> None:
    """Raise ``Unusable`` where bytecode of Python ``wanted`` would not work."""
    here = "{}.{}".format(*sys.version_info)
    if here != wanted:
        raise Unusable(
            f"expected Python {wanted} in the run, which pickled the function, got Python {here}. Set "
            f"python={wanted!r} or another image, or use serializer='json'."
        )


def unpickle(data: str) -> Any:
    """Return what cloudpickle packed."""
    try:
        __import__("cloudpickle")
    except ImportError:
        raise Unusable(
            "serializer: expected the package cloudpickle in the run, and its Python {}.{} has none. Install "
            "it in the image, or with commands=['pip install cloudpickle'].".format(*sys.version_info)
        ) from None
    return pickle.loads(base64.b64decode(data))


def dump(value: Any, call: dict[str, Any]) -> str:
    """Return the result as text of at most ``call["limit"]`` bytes."""
    if call["serializer"] == "cloudpickle":
        try:
            text = base64.b64encode(__import__("cloudpickle").dumps(value)).decode()
        except Exception as error:
            raise Unusable(f"the result: expected what can be pickled, got {error}.") from None
    else:
        problem = not_json(value, "the result")
        if problem:
            raise Unusable(
                f"{problem}. Return None, bool, int, float, str, lists and dicts (with str keys) of them, "
                "or use serializer='cloudpickle'."
            )
        text = json.dumps(value)
    if len(text) > call["limit"]:
        raise Unusable(
            f"the result: expected at most {call['limit']} bytes (max_result_bytes), got {len(text)}. Write "
            "what is big to a volume or a bucket, and return where it is."
        )
    return text


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
    sys.stdout.flush()
    sys.stderr.write(text)
    sys.stderr.flush()
    return [line[:500] for line in text.rstrip().split("\n")[-_TRACEBACK_LINES:]]


def frame(key: str, content: dict[str, Any]) -> list[str]:
    """Return the lines that ``_function.read_frame`` reads."""
    text = json.dumps(content).encode()
    encoded = base64.b64encode(hashlib.sha256(text).hexdigest().encode() + b"\n" + text).decode()
    parts = [encoded[start : start + _PART] for start in range(0, len(encoded), _PART)]
    return [f"@@dstack:{key}:{number}/{len(parts)}:{part}@@" for number, part in enumerate(parts, 1)]


def write_frame(key: str, content: dict[str, Any]) -> None:
    """Write the frame to the log, each line at once."""
    sys.stdout.flush()
    for line in frame(key, content):
        os.write(1, f"{line}\n".encode())


if __name__ == "__main__":
    sys.exit(main())
