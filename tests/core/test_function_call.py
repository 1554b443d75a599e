"""Packing a call: what travels, and what is refused before anything is submitted."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from dstack_core import (
    AsyncFunctionCollection,
    Configuration,
    ConfigurationError,
    FileMapping,
    FunctionCollection,
    Service,
    SubmitOptions,
    Task,
)
from dstack_core._function import main
from dstack_core._function_runs import defaults_of, prepare
from dstack_core.integration import FunctionCall, report_key

LIMIT = 40
KEY = "0123456789abcdef"


def train(rate: float, words: list[str] | None = None) -> Any:
    return [rate, words]


def uses_globals() -> Any:
    return [LIMIT, len("a"), json.dumps(1)]


def annotated(value: NotThere = None, *, other: Any = (1, 2)) -> NotThereEither:  # type: ignore[name-defined]  # noqa: F821
    import json.decoder as found

    def inner(deep: AlsoNot) -> Any:  # type: ignore[name-defined]  # noqa: F821
        return [found.JSONDecoder(), deep, *(each for each in value or [])]

    return inner(other)


async def later() -> int:
    return 3


def recursive(n: int) -> int:
    return 1 if n < 2 else n * recursive(n - 1)


class Model:
    def fit(self) -> None: ...

    def __call__(self) -> None: ...


def closure() -> Callable[[], int]:
    value = 3
    return lambda: value


def nested_def() -> Callable[[], int]:
    value = 3

    def inner() -> int:
        return value

    return inner


def written(call: FunctionCall, folder: Path) -> dict[str, Any]:
    """Write the call and return what ``call.json`` holds."""
    call.write(folder, KEY)
    found: dict[str, Any] = json.loads((folder / "call.json").read_text())
    return found


def test_the_source_and_plain_values_travel(tmp_path: Path) -> None:
    call = FunctionCall.pack(train, (0.5,), {"words": ("a", "\u00fc")})
    content = written(call, tmp_path / "new")
    source = (tmp_path / "new" / "source" / "dstack_function.py").read_text()
    assert (content["args"], content["kwargs"]) == ([0.5], {"words": ["a", "\u00fc"]})
    assert (content["key"], content["limit"]) == (KEY, 1024 * 1024)
    assert "def train(rate: float" in source
    assert "LIMIT" not in source
    assert "0.5" not in repr(call)


@pytest.mark.parametrize("function", [annotated, later, recursive, functools.partial(train, 1)])
def test_what_a_source_alone_makes_is_taken(function: Callable[..., Any]) -> None:
    arguments = [3] if function is recursive else []
    assert FunctionCall.pack(function, arguments).serializer == "json"


def test_a_partial_gives_its_arguments(tmp_path: Path) -> None:
    partial = functools.partial(functools.partial(train, 1), words=["a"])
    content = written(FunctionCall.pack(partial, (), {"words": ["b"]}), tmp_path)
    assert (content["name"], content["args"], content["kwargs"]) == ("train", [1], {"words": ["b"]})


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (closure(), "<lambda>: expected a plain function, got a lambda"),
        (nested_def(), "inner: expected a plain function, got a closure over value"),
        (Model().fit, "fit: expected a plain function, got a bound method, whose object does not travel"),
        (Model(), "expected a plain function, got Model"),
        (len, "len: expected a plain function, got builtin_function_or_method"),
        (uses_globals, "uses_globals: .* got one that uses LIMIT, json of its file"),
        ("train", "function: expected a function, got 'train'"),
    ],
)
def test_what_its_source_does_not_make_is_refused(function: Any, message: str) -> None:
    arguments = [[1]] if function is len else []
    with pytest.raises(ConfigurationError, match=message):
        FunctionCall.pack(function, arguments)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((object(),), {}, "argument 1: expected a value that JSON can carry, got object"),
        ((1,), {"words": {1: "a"}}, "argument 'words': expected str keys, got 1"),
        (
            (1,),
            {"words": [[b"x"]]},
            r"argument 'words'\[0\]\[0\]: expected a value that JSON can carry, got bytes",
        ),
        ((), {}, r"expected arguments for train\(rate.*missing a required argument: 'rate'"),
        ((1, 2, 3), {}, "too many positional arguments"),
        ((1,), {"nope": 3}, "unexpected keyword argument 'nope'"),
    ],
)
def test_arguments_that_do_not_fit_or_travel_are_refused(args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        FunctionCall.pack(train, args, kwargs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"serializer": "yaml"}, "serializer: expected one of 'json', 'cloudpickle', got 'yaml'"),
        ({"max_result_bytes": 0}, "max_result_bytes: expected 1 byte or more, got 0"),
        ({"torchrun": "yes"}, "torchrun: expected True or False, got 'yes'"),
        ({"allow_cloudpickle": "no"}, "allow_cloudpickle: expected True or False, got 'no'"),
        ({"cache_dir": 5}, "cache_dir: expected the path of a folder in the run, got 5"),
        ({"max_result_bytes": True}, "max_result_bytes: expected 1 byte or more, got True"),
        ({"requirements": "nowhere.txt"}, "expected the path of a requirements file, got 'nowhere.txt'"),
        ({"requirements": [3]}, r'expected a list such as \["torch==2.9"\]'),
        (
            {"requirements": ["-r other.txt"]},
            "expected lines without files of this machine, got '-r other.txt'",
        ),
        ({"requirements": ["-e ."]}, "expected lines without files of this machine"),
        ({"requirements": ["nowhere.whl"]}, "expected a wheel, got 'nowhere.whl'"),
        ({"requirements": "uv.lock"}, "Write one with `uv export -o requirements.txt`"),
        ({"modules": ["/nowhere"]}, "got '/nowhere', and there is none at /nowhere"),
        ({"modules": [3]}, "expected a module, a package or the path of a file or folder, got int"),
        ({"modules": [sys]}, "got 'sys', which has none"),
        ({"modules": [ModuleType("__main__")]}, "got the program itself"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        FunctionCall.pack(train, [1], **options)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder on ``sys.path`` that has a package and a module."""
    files = {
        "shapes/__init__.py": "SIDES = 4\n",
        "shapes/deep/__init__.py": "",
        "shapes/deep/area.py": "def area(side): return side * side\n",
        "shapes/data.bin": "x" * 100,
        "shapes/.gitignore": "*.bin\n",
        "shapes/__pycache__/area.pyc": "",
        "single.py": "ONE = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("shapes", "single")]:
        del sys.modules[name]


PACKAGE = {"shapes/__init__.py", "shapes/deep/__init__.py", "shapes/deep/area.py"}


def test_modules_travel_without_what_is_ignored(project: Path, tmp_path: Path) -> None:
    import shapes.deep.area  # type: ignore[import-not-found]
    import single  # type: ignore[import-not-found]

    ways: list[tuple[Any, set[str]]] = [
        ([shapes], PACKAGE),
        ([shapes.deep.area], PACKAGE),
        ([single, project / "shapes"], PACKAGE | {"single.py"}),
        ([str(project / "single.py")], {"single.py"}),
        (project / "single.py", {"single.py"}),
    ]
    for given, wanted in ways:
        folder = tmp_path / f"to-{len(list(tmp_path.iterdir()))}"
        FunctionCall.pack(train, [1], modules=given).write(folder, KEY)
        root = folder / "modules"
        assert {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} == wanted


def test_two_modules_of_one_name_are_refused(project: Path) -> None:
    (project / "other").mkdir()
    (project / "other" / "single.py").write_text("")
    with pytest.raises(ConfigurationError, match="modules: expected names that differ"):
        FunctionCall.pack(train, [1], modules=[project / "single.py", project / "other" / "single.py"])


def test_a_folder_without_files_and_a_link_to_a_folder_are_refused(project: Path) -> None:
    (project / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="expected a folder with at least one file"):
        FunctionCall.pack(train, [1], modules=[project / "empty"])
    (project / "shapes" / "link").symlink_to(project / "empty")
    with pytest.raises(ConfigurationError, match="a link to a folder"):
        FunctionCall.pack(train, [1], modules=[project / "shapes"])


def test_too_much_is_refused_with_the_biggest_files(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "shapes" / "big.txt").write_text("x" * 2 * 1024 * 1024)
    with pytest.raises(
        ConfigurationError, match=r"expected at most 2097152 bytes .* biggest: .*big.txt \(2097152"
    ):
        FunctionCall.pack(train, [1], modules=[project / "shapes"])
    monkeypatch.setenv("DSTACK_SERVER_CODE_UPLOAD_LIMIT", "4000000")
    FunctionCall.pack(train, [1], modules=[project / "shapes"])
    with pytest.raises(ConfigurationError, match="biggest: the arguments"):
        FunctionCall.pack(train, ["x" * 4000000])


def test_requirements_are_a_list_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "a-1-py3-none-any.whl").write_bytes(b"wheel")
    (tmp_path / "requirements.txt").write_text("torch==2.9\n# comment\n./a-1-py3-none-any.whl\n")
    call = FunctionCall.pack(train, [1], requirements=tmp_path / "requirements.txt")
    text = written(call, tmp_path / "to")["requirements"]
    assert text.startswith("torch==2.9\n# comment\n./wheels/a-1-py3-none-any.whl  # ")
    assert (tmp_path / "to" / "wheels" / "a-1-py3-none-any.whl").read_bytes() == b"wheel"
    # A wheel that was built again is another requirement.
    (tmp_path / "a-1-py3-none-any.whl").write_bytes(b"other")
    again = FunctionCall.pack(train, [1], requirements=tmp_path / "requirements.txt")
    assert written(again, tmp_path / "again")["requirements"] != text
    listed = FunctionCall.pack(train, [1], requirements=["torch==2.9", "--no-index"])
    assert written(listed, tmp_path / "list")["requirements"] == "torch==2.9\n--no-index\n"


def test_the_configuration_gets_the_files_and_the_command() -> None:
    base = Task(commands=["echo first"], files=["a.txt"], env={"ONE": "1"}, nodes=2)
    call = FunctionCall.pack(train, ["secret-4711"])
    task = call.configuration("/folder", KEY, base, image="python:3.12", commands=["echo second"])
    assert task.commands is not None
    assert task.commands[:2] == ["echo first", "echo second"]
    assert [file.path for file in task.files or [] if isinstance(file, FileMapping)] == [
        "a.txt",
        "~/.dstack/function",
    ]
    assert (task.env, task.image, getattr(task, "nodes", None)) == ({"ONE": "1"}, "python:3.12", 2)
    assert "expected python3 in the image '\"'\"'python:3.12'\"'\"', got none" in task.commands[2]
    assert "secret-4711" not in task.model_dump_json()
    assert base.commands == ["echo first"]


@pytest.mark.parametrize("base", [Service(port=80, commands=["true"]), Configuration(type="dev-environment")])
def test_only_a_task_takes_a_call(base: Configuration) -> None:
    with pytest.raises(ConfigurationError, match=f"configuration: expected a task, got a {base.type}"):
        FunctionCall.pack(train, [1]).configuration("/folder", KEY, base)


def test_a_key_belongs_to_a_marker() -> None:
    assert report_key("mine") == report_key("mine") != report_key("other")
    assert len(report_key("mine")) == 16


class Version(NamedTuple):
    major: int
    minor: int
    micro: int


def test_equal_calls_have_equal_fingerprints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "rates.py"
    module.write_text("RATE = 7\n")

    def fingerprint(*args: Any, **options: Any) -> str:
        return FunctionCall.pack(train, args, **options).fingerprint

    found = [
        fingerprint(1),
        fingerprint(2),
        fingerprint(1, requirements=["torch"]),
        fingerprint(1, modules=module),
        fingerprint(1, serializer="cloudpickle"),
    ]
    module.write_text("RATE = 8\n")
    assert len({*found, fingerprint(1, modules=module)}) == 6
    # With its source, a function is the same on a machine with another Python.
    monkeypatch.setattr(sys, "version_info", Version(3, 99, 0))
    assert fingerprint(1) == found[0]
    assert fingerprint(1, serializer="cloudpickle") != found[4]


def test_a_decorator_can_check_a_function_without_arguments() -> None:
    FunctionCall.check(train)
    FunctionCall.check(uses_globals, serializer="cloudpickle")
    with pytest.raises(ConfigurationError, match="got one that uses LIMIT, json of its file"):
        FunctionCall.check(uses_globals)
    with pytest.raises(ConfigurationError, match="max_result_bytes: expected 1 byte or more, got True"):
        FunctionCall.check(train, max_result_bytes=True)
    wrong: Any = "yaml"
    with pytest.raises(ConfigurationError, match="serializer: expected one of"):
        FunctionCall.check(train, serializer=wrong)


@pytest.mark.parametrize("switch", ["argument", "environment"])
def test_cloudpickle_can_be_forbidden(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if switch == "environment":
        monkeypatch.setenv("DSTACK_FORBID_CLOUDPICKLE", "1")
    with pytest.raises(
        ConfigurationError, match="serializer: expected 'json', got 'cloudpickle', which is forbidden"
    ):
        FunctionCall.pack(train, [1], serializer="cloudpickle", allow_cloudpickle=switch == "environment")


def test_a_missing_cloudpickle_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(ConfigurationError, match="Run `pip install cloudpickle`"):
        FunctionCall.pack(train, [1], serializer="cloudpickle")


def test_cloudpickle_takes_closures_and_reports_what_it_cannot() -> None:
    for function in (closure(), nested_def(), uses_globals, Model().fit):
        call = FunctionCall.pack(function, serializer="cloudpickle")
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        assert call.configuration("/folder", KEY).python == version
        assert call.configuration("/folder", KEY, image="mine").python is None
    with pytest.raises(
        ConfigurationError, match="train: expected a function and arguments that can be pickled"
    ):
        FunctionCall.pack(train, [(each for each in [1])], serializer="cloudpickle")


def with_image(image: str, *, retry_budget: int = 3) -> Any:
    return [image, retry_budget]


@pytest.mark.parametrize("method", [FunctionCollection.run, FunctionCollection.submit])
def test_an_option_that_is_also_a_parameter_is_refused(method: Callable[..., Any]) -> None:
    defaults = defaults_of(method)
    given = dict(defaults)
    ways: list[Any] = [((), {"image": "python"}), (("python",), {"retry_budget": 4}), ((), {})]
    for args, options in ways:
        with pytest.raises(
            ConfigurationError, match=r"Pass functools.partial\(with_image, (image|retry_budget)="
        ):
            prepare(with_image, args, {}, {**given, **options}, defaults)
    # What is passed by position, or by partial, is not ambiguous.
    prepared = prepare(with_image, ("python",), {}, {**given, "image": "mine"}, defaults)
    assert prepared.given["image"] == "mine"
    prepare(
        functools.partial(with_image, image="a", retry_budget=4), (), {}, {**given, "image": "b"}, defaults
    )


def test_the_names_of_runs() -> None:
    defaults = defaults_of(FunctionCollection.run)
    name = prepare(train, (1,), {}, defaults, defaults).name
    assert name.startswith("train-")
    assert name != prepare(train, (1,), {}, defaults, defaults).name
    odd = prepare(with_image, ("a",), {}, {**defaults, "run_name": "mine"}, defaults)
    assert (odd.name, odd.generated) == ("mine", False)


def test_every_submit_option_is_an_option_of_a_call() -> None:
    # ``args`` are for commands, and a function has its own.
    wanted = SubmitOptions.__optional_keys__ - {"args"}
    for kind in (FunctionCollection, AsyncFunctionCollection):
        for method in (kind.run, kind.submit):
            assert wanted <= set(defaults_of(method))
    assert set(defaults_of(FunctionCollection.run)) - set(defaults_of(FunctionCollection.submit)) == {
        *("poll_interval", "on_log", "on_event"),
    }


def test_the_program_needs_nothing_and_is_small() -> None:
    source = inspect.getsource(main)
    imported = {
        line.split()[1].partition(".")[0]
        for line in source.splitlines()
        if line.strip().startswith(("import ", "from "))
    }
    assert imported <= sys.stdlib_module_names
    assert len(source) < 64 * 1024
