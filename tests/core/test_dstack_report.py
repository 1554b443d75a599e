"""The file that reports from inside a run: its lines as an independent reader finds them, and its errors."""

from __future__ import annotations

import ast
import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dstack_report
from dstack_core._report import dstack_report as travelling
from tests.replaced import replace_in

FILE = Path(travelling.__file__)
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20
# The oldest Python that runs the file, where this machine has it.
_OLD = (shutil.which("python3.8"), *Path("~/.pyenv/versions").expanduser().glob("3.8.*/bin/python3.8"))
PYTHONS = [sys.executable, *[str(path) for path in _OLD if path][-1:]]
_PART = re.compile(rb"::dstack:([A-Za-z0-9]{1,32}):(\d+)/(\d+):(\d+):(.*)", re.DOTALL)


def posix_cksum(data: bytes) -> int:
    """Return what the command prints; it is the judge of the checksums."""
    done = subprocess.run(["cksum"], input=data, capture_output=True, check=True)
    return int(done.stdout.split()[0])


def read(output: bytes) -> tuple[list[dict[str, Any]], bytes]:
    """Return the reports of an output and the text beside them. A broken report fails the test."""
    found: list[dict[str, Any]] = []
    parts: dict[bytes, list[bytes]] = {}
    text = b""
    for line in output.replace(b"\r\n", b"\n").splitlines(keepends=True):
        assert len(line) <= 4096
        before, mark, rest = line.partition(b"::dstack:")
        text += before
        if mark and rest.startswith(b":{"):
            found.append(json.loads(rest[1:]))
            assert len(rest) <= 3000 + len(b":\n")
        elif mark:
            match = _PART.fullmatch((mark + rest).removesuffix(b"\n"))
            assert match, line
            ident, number, total, cksum, piece = match.groups()
            pieces = parts.setdefault(ident, [])
            pieces.append(piece)
            assert len(pieces) == int(number)
            if len(pieces) == int(total):
                message = b"".join(parts.pop(ident))
                assert posix_cksum(message) == int(cksum)
                found.append(json.loads(message))
    assert not parts
    return found, text


def environment(**more: str) -> dict[str, str]:
    # PYTHONUNBUFFERED would hide that a report does not wait for what was printed before it.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "PYTHONPATH": str(FILE.parent), "DSTACK_RUN_NAME": "train", **more}


def run(code: str, python: str = sys.executable, *, status: int = 0, **more: str) -> bytes:
    script = f"import dstack_report as report\n{code}"
    # Not in this repository, whose package has the same name.
    done = subprocess.run(
        [python, "-c", script], env=environment(**more), cwd=FILE.parent, capture_output=True, check=False
    )
    assert done.returncode == status, done.stderr.decode()
    assert status or not done.stderr
    return done.stdout


@pytest.fixture
def reports(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], list[dict[str, Any]]]:
    """Read what this process reports."""
    monkeypatch.setenv("DSTACK_RUN_NAME", "train")
    return lambda: read(capfdbinary.readouterr().out)[0]


EVERY = f"""
report.metric(step=10, loss=0.5, lr=1)
report.metric(loss=float("nan"), up=float("inf"), down=-float("inf"), flag=True)
report.metric(**{{"val/loss": 2}})
report.progress(0.25, "epoch 1")
report.progress(1 + 1e-9)
report.progress(done=3, total=12, text="files")
report.progress(done=13, total=12)
report.result({{"accuracy": 0.5, "names": ["ä", None], "pair": (1, 2)}})
report.result(None)
report.table("scores", [{{"a": 1}}, {{"b": float("nan"), "a": 2}}])
report.table("chosen", [{{"a": 1, "b": 2}}], columns=["b"])
report.table("lists", [[1, "x"], (2, "y")], columns=["n", "s"])
report.table("empty", [])
report.link("https://example.com/board", "Board")
report.link("http://example.com")
report.image("plot", {PNG!r}, "A plot")
report.asset("s3://bucket/table", rows=7)
report.asset("s3://bucket/table")
report.checkpoint("/out/1.pt", step=3, best=True)
report.checkpoint("/out/2.pt")
report.skip("nothing new")
print("not reached")
"""
REPORTED = [
    {"kind": "metric", "step": 10, "loss": 0.5, "lr": 1},
    {"kind": "metric", "loss": "nan", "up": "inf", "down": "-inf", "flag": 1},
    {"kind": "metric", "val/loss": 2},
    {"kind": "progress", "value": 0.25, "text": "epoch 1"},
    {"kind": "progress", "value": 1},
    {"kind": "progress", "done": 3, "total": 12, "text": "files"},
    {"kind": "progress", "done": 12, "total": 12},
    {"kind": "result", "value": {"accuracy": 0.5, "names": ["ä", None], "pair": [1, 2]}},
    {"kind": "result", "value": None},
    {"kind": "table", "name": "scores", "columns": ["a", "b"], "rows": [[1, None], [2, "nan"]]},
    {"kind": "table", "name": "chosen", "columns": ["b"], "rows": [[2]]},
    {"kind": "table", "name": "lists", "columns": ["n", "s"], "rows": [[1, "x"], [2, "y"]]},
    {"kind": "table", "name": "empty", "columns": [], "rows": []},
    {"kind": "link", "url": "https://example.com/board", "text": "Board"},
    {"kind": "link", "url": "http://example.com"},
    {"kind": "image", "name": "plot", "png": base64.b64encode(PNG).decode(), "text": "A plot"},
    {"kind": "asset", "uri": "s3://bucket/table", "metadata": {"rows": 7}},
    {"kind": "asset", "uri": "s3://bucket/table"},
    {"kind": "checkpoint", "path": "/out/1.pt", "step": 3, "metadata": {"best": True}},
    {"kind": "checkpoint", "path": "/out/2.pt"},
    {"kind": "skip", "reason": "nothing new"},
]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_function_reports(python: str) -> None:
    found, text = read(run(EVERY, python))
    assert found == REPORTED
    assert text == b""


@pytest.mark.parametrize("python", PYTHONS)
def test_outside_a_run_nothing_is_written(python: str) -> None:
    assert run(EVERY, python, DSTACK_RUN_NAME="") == b""


def test_the_file_needs_no_newer_python_than_it_states() -> None:
    ast.parse(FILE.read_text(), feature_version=(3, 8))
    modules = {
        node.module for node in ast.walk(ast.parse(FILE.read_text())) if isinstance(node, ast.ImportFrom)
    }
    modules |= {
        alias.name
        for node in ast.walk(ast.parse(FILE.read_text()))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert modules <= set(sys.stdlib_module_names)


def test_the_package_has_every_function_of_the_file() -> None:
    public = {
        name
        for name, value in vars(travelling).items()
        if getattr(value, "__module__", None) == travelling.__name__ and not name.startswith("_")
    }
    assert public == set(dstack_report.__all__)
    assert dstack_report.__all__ == sorted(dstack_report.__all__)


def test_a_run_is_known_by_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSTACK_RUN_NAME", "train")
    assert dstack_report.is_active()
    monkeypatch.delenv("DSTACK_RUN_NAME")
    assert not dstack_report.is_active()


@pytest.mark.parametrize("size", [0, 1, 255, 256, 3000, 70_000])
def test_the_checksum_is_that_of_the_command(size: int) -> None:
    data = bytes(number * 7 % 256 for number in range(size))
    assert travelling._cksum(data) == posix_cksum(data)


Reports = Callable[[], list[dict[str, Any]]]


@pytest.mark.parametrize("length", [1, 2999, 3000, 3001, 6000, 6001, 300_000])
def test_a_message_of_any_length_arrives(reports: Reports, length: int) -> None:
    empty = len('{"kind":"result","value":""}')
    value = "x" * max(1, length - empty)
    dstack_report.result(value)
    assert reports() == [{"kind": "result", "value": value}]


def test_text_that_resembles_a_report_or_ends_lines_arrives(reports: Reports) -> None:
    value = '::dstack::{"kind":"skip"}\r\n\x1b[0m\u2028' + "\ud800 ::dstack:a:1/2:3:" * 400
    dstack_report.result(value)
    assert reports() == [{"kind": "result", "value": value}]


class Scalar:
    """A number of an array library, which is not a ``float``."""

    shape = ()

    def __init__(self, value: object) -> None:
        self.value = value

    def item(self) -> object:
        return self.value

    def __float__(self) -> float:
        raise AssertionError


class Exact:
    """A number with ``__float__`` alone, as of ``decimal``."""

    def __float__(self) -> float:
        return 0.5


def test_scalars_of_array_libraries_are_numbers(reports: Reports) -> None:
    dstack_report.metric(step=Scalar(3), loss=Scalar(0.5), exact=Exact())
    dstack_report.result({"loss": Scalar(0.5)})
    dstack_report.table("t", [[Scalar(1)]], columns=["n"])
    assert reports() == [
        {"kind": "metric", "step": 3, "loss": 0.5, "exact": 0.5},
        {"kind": "result", "value": {"loss": 0.5}},
        {"kind": "table", "name": "t", "columns": ["n"], "rows": [[1]]},
    ]


class Figure:
    """What has ``savefig``, as a figure of Matplotlib has."""

    def savefig(self, file: Any, *, format: str) -> None:
        assert format == "png"
        file.write(PNG)


@pytest.mark.parametrize("kind", ["bytes", "bytearray", "str", "path", "figure"])
def test_an_image_comes_from_bytes_a_path_or_a_figure(reports: Reports, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "plot.png"
    file.write_bytes(PNG)
    given = {"bytes": PNG, "bytearray": bytearray(PNG), "str": str(file), "path": file, "figure": Figure()}
    dstack_report.image("plot", given[kind])
    assert reports() == [{"kind": "image", "name": "plot", "png": base64.b64encode(PNG).decode()}]


cyclic: list[Any] = []
cyclic.append(cyclic)
WRONG: list[tuple[Callable[[Any], object], type[Exception], str]] = [
    (lambda r: r.metric(loss="x"), TypeError, "metric: expected a number for loss, got 'x'."),
    (lambda r: r.metric(loss=None), TypeError, "metric: expected a number for loss, got None."),
    (lambda r: r.metric(loss=[1]), TypeError, "metric: expected a number for loss, got [1]."),
    (lambda r: r.metric("x", loss=1), TypeError, "metric: expected a number for step, got 'x'."),
    (lambda r: r.metric(float("nan"), loss=1), TypeError, "metric: expected a number for step, got nan."),
    (lambda r: r.progress(37), ValueError, "progress: expected a value from 0 to 1, got 37. Counts are done"),
    (lambda r: r.progress(-0.1), ValueError, "progress: expected a value from 0 to 1, got -0.1."),
    (lambda r: r.progress(float("nan")), ValueError, "progress: expected a value from 0 to 1, got nan."),
    (
        lambda r: r.progress(done=1, total=0),
        ValueError,
        "progress: expected done from 0 and total above 0, got (1, 0).",
    ),
    (
        lambda r: r.progress(done=-1, total=2),
        ValueError,
        "progress: expected done from 0 and total above 0, got (-1, 2).",
    ),
    (lambda r: r.result({"a": [1, {2}]}), TypeError, "result: expected JSON data at value['a'][1], got {2}."),
    (lambda r: r.result([{1: 2}]), TypeError, "result: expected strings as keys of value[0], got 1."),
    (
        lambda r: r.result([float("inf")]),
        ValueError,
        "result: expected a finite number at value[0], got inf.",
    ),
    (lambda r: r.result(cyclic), ValueError, "result: expected at most 100 nested levels, got more."),
    (lambda r: r.result(b"x" * 99), TypeError, "result: expected JSON data at value, got b'xxx"),
    (lambda r: r.table("t", [[1]]), TypeError, "table: expected columns for rows that are lists, got none."),
    (
        lambda r: r.table("t", [[1]], ["a", "b"]),
        ValueError,
        "table: expected a dict or 2 values at rows[0], got [1]",
    ),
    (lambda r: r.table("t", ["ab"], ["a", "b"]), ValueError, "table: expected a dict or 2 values at rows[0]"),
    (lambda r: r.table("t", [{1: 2}]), TypeError, "table: expected a non-empty string for columns, got 1."),
    (lambda r: r.table("t", [{"a": {1}}]), TypeError, "table: expected JSON data at rows[0][0], got {1}."),
    (lambda r: r.image("i", b"GIF89a.."), ValueError, "image: expected a PNG, got b'GIF89a..'. Convert"),
    (lambda r: r.image("i", 7), TypeError, "image: expected bytes, a path or a figure for png, got 7."),
    (
        lambda r: r.image("i", PNG + bytes(1 << 18)),
        ValueError,
        "image: expected at most 256 KB for 'i', got more.",
    ),
    (
        lambda r: r.asset("s3://b", rows={1}),
        TypeError,
        "asset: expected JSON data at metadata['rows'], got {1}.",
    ),
    (lambda r: r.checkpoint("p", "x"), TypeError, "checkpoint: expected a number for step, got 'x'."),
]
# What is cheap to check is checked outside a run too.
WRONG_ANYWHERE: list[tuple[Callable[[Any], object], type[Exception], str]] = [
    (lambda r: r.metric(), TypeError, "metric: expected at least one number such as loss=0.3, got none."),
    (
        lambda r: r.metric(kind=1),
        ValueError,
        "metric: expected names other than kind, v and step, got 'kind'.",
    ),
    (lambda r: r.metric(v=1), ValueError, "metric: expected names other than kind, v and step, got 'v'."),
    (
        lambda r: r.progress(),
        TypeError,
        "progress: expected a value from 0 to 1, or done and total, got value=None, done=None, total=None.",
    ),
    (
        lambda r: r.progress(done=1),
        TypeError,
        "progress: expected a value from 0 to 1, or done and total, got",
    ),
    (
        lambda r: r.progress(0.5, done=1, total=2),
        TypeError,
        "progress: expected a value from 0 to 1, or done",
    ),
    (lambda r: r.progress(0.5, 3), TypeError, "progress: expected a non-empty string for text, got 3."),
    (lambda r: r.table(3, []), TypeError, "table: expected a non-empty string for name, got 3."),
    (lambda r: r.link("s3://bucket"), ValueError, "link: expected an http:// or https:// address, got"),
    (lambda r: r.link(""), TypeError, "link: expected a non-empty string for url, got ''."),
    (lambda r: r.image("", PNG), TypeError, "image: expected a non-empty string for name, got ''."),
    (lambda r: r.asset(None), TypeError, "asset: expected a non-empty string for uri, got None."),
    (lambda r: r.checkpoint(b"p"), TypeError, "checkpoint: expected a non-empty string for path, got b'p'."),
    (lambda r: r.skip(None), TypeError, "skip: expected a non-empty string for reason, got None."),
]


def _case_id(part: object) -> str:
    """Name a case by its message: the text of a function holds an address, which differs between processes."""
    return part[:60] if isinstance(part, str) else getattr(part, "__name__", "")


@pytest.mark.parametrize(("call", "error", "text"), WRONG + WRONG_ANYWHERE, ids=_case_id)
def test_a_wrong_argument_raises_and_reports_nothing(
    reports: Reports, call: Callable[[Any], object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        call(dstack_report)
    assert str(caught.value).startswith(f"dstack_report.{text}")
    assert len(str(caught.value)) < 220
    assert reports() == []


@pytest.mark.parametrize(("call", "error", "text"), WRONG_ANYWHERE, ids=_case_id)
def test_what_is_cheap_to_check_is_checked_outside_a_run(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[Any], object], error: type[Exception], text: str
) -> None:
    monkeypatch.delenv("DSTACK_RUN_NAME", raising=False)
    with pytest.raises(error) as caught:
        call(dstack_report)
    assert str(caught.value).startswith(f"dstack_report.{text}")


@pytest.mark.parametrize("call", [case[0] for case in WRONG])
def test_what_costs_time_is_not_done_outside_a_run(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[Any], object]
) -> None:
    monkeypatch.delenv("DSTACK_RUN_NAME", raising=False)
    call(dstack_report)


def test_a_path_is_a_string_on_the_wire(reports: Reports, tmp_path: Path) -> None:
    dstack_report.checkpoint(tmp_path, step=1)
    assert reports() == [{"kind": "checkpoint", "path": str(tmp_path), "step": 1}]


def test_skip_can_be_caught_and_has_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSTACK_RUN_NAME", raising=False)
    with pytest.raises(dstack_report.Skipped) as caught:
        dstack_report.skip("no new data")
    assert (caught.value.reason, caught.value.code, str(caught.value)) == ("no new data", 0, "no new data")
    assert isinstance(caught.value, SystemExit)


@pytest.mark.parametrize("python", PYTHONS)
def test_printed_text_keeps_its_order(python: str) -> None:
    code = "print('before', end=' '); report.metric(a=1); print('after'); report.metric(b=2); print('end')"
    output = run(code, python).decode()
    assert output == (
        'before ::dstack::{"kind":"metric","a":1}\nafter\n::dstack::{"kind":"metric","b":2}\nend\n'
    )


def test_the_seed_of_the_training_is_not_used() -> None:
    code = "import random; random.seed(1); report.result('x' * 9000); print(random.random())"
    _, text = read(run(code))
    assert text == run("import random; random.seed(1); print(random.random())")


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(
    "close",
    [
        "os.close(1)",
        "r, w = os.pipe(); os.dup2(w, 1); os.close(w); os.close(r)",
        "sys.stdout = None; os.close(1)",
    ],
)
def test_a_report_that_cannot_be_written_is_dropped(python: str, close: str) -> None:
    run(
        f"import os, sys\n{close}\nreport.metric(a=1); report.result('x' * 9000)\nos._exit(7)",
        python,
        status=7,
    )


@pytest.mark.parametrize(
    "lost", ["sys.stdout.close()", "sys.stdout = None", "sys.stdout = open(os.devnull, 'w')"]
)
def test_a_report_does_not_depend_on_the_file_that_print_uses(lost: str) -> None:
    found, _ = read(run(f"import os, sys\n{lost}\nreport.metric(a=1)\nos._exit(0)"))
    assert found == [{"kind": "metric", "a": 1}]


def test_a_process_that_starts_without_stdout_writes_to_no_file(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    code = f"import dstack_report, os\nassert os.open({str(taken)!r}, os.O_WRONLY | os.O_CREAT) == 1\n"
    code += "dstack_report.metric(a=1)"
    command = ["sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, code]
    subprocess.run(command, env=environment(), cwd=FILE.parent, check=True)
    assert taken.read_bytes() == b""


def read_all(descriptor: int) -> bytes:
    """Read a terminal or pipe until every writer has closed it."""
    output = b""
    while True:
        try:
            data = os.read(descriptor, 1 << 16)
        except OSError:
            return output
        if not data:
            return output
        output += data


WRITERS = """
import sys, threading

def work(thread):
    for number in range(40):
        report.metric(process=int(sys.argv[1]), thread=thread, number=number)
        report.result([int(sys.argv[1]), thread, number, "x" * 5000])
        if number % 8 == 0:
            report.result([int(sys.argv[1]), thread, number, "y" * 70000])

threads = [threading.Thread(target=work, args=(thread,)) for thread in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_threads_and_processes_do_not_break_each_others_reports(kind: str, python: str) -> None:
    reader, writer = os.openpty() if kind == "terminal" else os.pipe()
    script = f"import dstack_report as report\n{WRITERS}"
    processes = [
        subprocess.Popen(
            [python, "-c", script, str(number)], stdout=writer, env=environment(), cwd=FILE.parent
        )
        for number in range(4)
    ]
    os.close(writer)
    found, text = read(read_all(reader))
    os.close(reader)
    assert [process.wait() for process in processes] == [0] * 4
    assert text == b""
    assert len(found) == 4 * 3 * (40 + 40 + 5)
    metrics = {(one["process"], one["thread"], one["number"]) for one in found if one["kind"] == "metric"}
    results = {tuple(one["value"][:3]) for one in found if one["kind"] == "result"}
    assert metrics == results
    assert len(metrics) == 4 * 3 * 40


@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_a_full_stdout_that_does_not_block_takes_every_report(kind: str) -> None:
    reader, writer = os.openpty() if kind == "terminal" else os.pipe()
    os.set_blocking(writer, False)
    code = "import threading\n"
    code += "work = lambda: [report.result([n, 'x' * 20000]) for n in range(20)]\n"
    code += "threads = [threading.Thread(target=work) for _ in range(3)]\n"
    code += "for thread in threads: thread.start()\n"
    script = f"import dstack_report as report\n{code}"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=writer, env=environment(), cwd=FILE.parent
    )
    os.close(writer)
    found, _ = read(read_all(reader))
    os.close(reader)
    assert process.wait() == 0
    assert sorted(one["value"][0] for one in found) == sorted([*range(20)] * 3)


def test_what_the_system_takes_in_pieces_arrives_whole(
    reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = os.write, [0]

    def partial(descriptor: int, data: bytes) -> int:
        calls[0] += 1
        if calls[0] % 2:
            raise BlockingIOError
        return write(descriptor, data[:700])

    with monkeypatch.context() as patch:
        replace_in(patch, travelling, "os", write=partial)
        dstack_report.result("x" * 7000)
        dstack_report.metric(a=1)
    assert reports() == [{"kind": "result", "value": "x" * 7000}, {"kind": "metric", "a": 1}]
    assert calls[0] > 20


@pytest.mark.parametrize("python", PYTHONS)
def test_a_forked_process_reports_while_its_parent_holds_the_lock(python: str) -> None:
    # From Python 3.12 on, a fork beside threads warns; here it is what is tested.
    code = """
import os, threading, warnings
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
held, done = threading.Event(), threading.Event()

def hold():
    with report._lock:
        held.set()
        done.wait()

holder = threading.Thread(target=hold)
holder.start()
held.wait()
child = os.fork()
if child == 0:
    report.metric(child=1)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
done.set()
holder.join()
report.metric(parent=1)
"""
    assert read(run(code, python))[0] == [{"kind": "metric", "child": 1}, {"kind": "metric", "parent": 1}]


def test_a_signal_handler_reports_while_its_thread_is_reporting() -> None:
    code = """
import os, signal
signal.signal(signal.SIGUSR1, lambda *_: report.checkpoint("/out/last.pt"))
with report._lock:
    os.kill(os.getpid(), signal.SIGUSR1)
report.metric(a=1)
"""
    assert [one["kind"] for one in read(run(code))[0]] == ["checkpoint", "metric"]
