"""A call of a Python function, packed for a run.

The way in: function, arguments and modules travel as files of the run, with ``main.py``, the program that
makes the call. So they are neither in the run's configuration nor in its environment nor in a process list.

The way out: the log is all that a run returns. The program writes there what the function returned or raised,
as a message of kind "function" (docs/report-protocol.md). The key of the message, drawn from the run's
marker, sets it apart from what the function itself may print.
"""

from __future__ import annotations

import inspect
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from dstack_core._function import main
from dstack_core._function.arguments import check_arguments, pickled, plain_arguments, without_partial
from dstack_core._function.modules import ModuleLike, find_modules, names_of
from dstack_core._function.requirements import WHEELS, Requirements, RequirementsLike, read_requirements
from dstack_core._function.result import Serializer, load_cloudpickle, value_of
from dstack_core._function.source import source_of
from dstack_core.errors import ConfigurationError
from dstack_core.models.configurations import Configuration, RegistryAuth, Task
from dstack_core.models.files import FileMapping
from dstack_core.models.options import check_choice
from dstack_core.models.outcome import Outcome

# The result travels in the log, in lines of 3000 bytes; a larger one holds up its relay.
MAX_RESULT_BYTES = 1024 * 1024
# What a message has beside the value.
_MESSAGE_HEAD = 4096
FOLDER = "~/.dstack/function"
# What a server takes by default. One with another limit has it in this variable (PROTOCOL 1.3).
_UPLOAD_LIMIT = 2 * 1024 * 1024
_UPLOAD_LIMIT_VARIABLE = "DSTACK_SERVER_CODE_UPLOAD_LIMIT"
# A tar archive has a block of 512 bytes before each file, and fills its last one.
_TAR_BLOCK = 512
# The program and what else is always there.
_PROGRAM_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A function with its arguments and what it needs, ready to be written into the files of a run.

    Make one with ``FunctionCall.pack``. The next steps are ``write``, ``configuration``, and after the run's
    end ``read``.

    Attributes:
        name: The function's name, for messages (str).
        serializer: ``"json"`` or ``"cloudpickle"``.
        max_result_bytes: The limit for the result (int).
        allow_cloudpickle: Whether a result may be unpickled (bool).
    """

    name: str
    serializer: Serializer
    max_result_bytes: int
    allow_cloudpickle: bool
    _content: Mapping[str, Any] = field(repr=False)
    _source: str | None = field(repr=False)
    _modules: Mapping[str, Path] = field(repr=False)
    _requirements: Requirements = field(repr=False)

    @classmethod
    def pack(
        cls,
        function: Callable[..., Any],
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        serializer: Serializer = "json",
        modules: Iterable[ModuleLike] | ModuleLike = (),
        requirements: RequirementsLike = (),
        cache_dir: str | None = None,
        torchrun: bool = False,
        max_result_bytes: int = MAX_RESULT_BYTES,
        allow_cloudpickle: bool = True,
    ) -> FunctionCall:
        """Check and pack a call; reads the source of the function, and files.

        With ``"cloudpickle"`` the result is unpickled here, which executes what the run put into it: control
        of the run's image, of its packages or of its log is control of this process. So the default is
        ``"json"``, which carries plain values only.

        Args:
            function: A plain or async function; also a ``functools.partial`` of one.
            args: Its positional arguments.
            kwargs: Its keyword arguments. Default: none.
            serializer: With ``"json"`` the function travels as its source, and arguments and result are plain
                values (tuples become lists). With ``"cloudpickle"`` it is pickled with what it refers to; the
                run needs the package ``cloudpickle`` and this Python's minor version.
            modules: What the function imports of the own project: modules, packages, or paths of files and
                folders. Default: none.
            requirements: What the run installs before it calls the function: a list as for pip, or the path
                of a requirements file. A wheel of this machine travels. Default: nothing.
            cache_dir: The folder in the run that keeps what was installed, for the next start with the same
                requirements; such as the path of a volume. Default: ``DSTACK_FUNCTION_CACHE`` of the run,
                else ``~/.cache/dstack-functions``.
            torchrun: Call the function once a GPU, under torchrun; the process of rank 0 returns.
            max_result_bytes: The limit for the result, which travels in the run's log. Default 1 MiB.
            allow_cloudpickle: If False, nothing is pickled or unpickled here. The environment variable
                ``DSTACK_FORBID_CLOUDPICKLE=1`` does the same for the whole process.

        Returns:
            The call.

        Raises:
            ConfigurationError: Something cannot travel, or is wrong.

        Example:
            ``call = FunctionCall.pack(train, [0.1], requirements=["torch==2.9"])``
        """
        _check_options(serializer, max_result_bytes)
        for option, value in (("torchrun", torchrun), ("allow_cloudpickle", allow_cloudpickle)):
            if not isinstance(value, bool):
                raise ConfigurationError(f"{option}: expected True or False, got {value!r}.")
        if cache_dir is not None and not (isinstance(cache_dir, str) and cache_dir):
            raise ConfigurationError(
                f"cache_dir: expected the path of a folder in the run, got {cache_dir!r}."
            )
        plain, args, kwargs = without_partial(function, list(args), dict(kwargs or {}))
        name = getattr(plain, "__name__", type(plain).__name__)
        check_arguments(plain, name, args, kwargs)
        content = {
            "serializer": serializer,
            "python": f"{sys.version_info.major}.{sys.version_info.minor}",
            "name": name,
            "limit": max_result_bytes,
            "torchrun": torchrun,
            "cache_dir": cache_dir,
        }
        files, source = find_modules(modules), None
        if serializer == "json":
            source = source_of(plain)
            content |= plain_arguments(name, args, kwargs)
        else:
            content |= pickled(
                plain, name, args, kwargs, load_cloudpickle(allow_cloudpickle), names_of(files)
            )
        needed = read_requirements(requirements)
        _check_size([*files.values(), *needed.wheels.values()], len(json.dumps(content)) + len(source or ""))
        return cls(name, serializer, max_result_bytes, allow_cloudpickle, content, source, files, needed)

    @staticmethod
    def check(
        function: Callable[..., Any],
        *,
        serializer: Serializer = "json",
        max_result_bytes: int = MAX_RESULT_BYTES,
    ) -> None:
        """Check what a decorator knows before there are arguments; reads the source of the function.

        Args:
            function: As for ``pack``, and so are the others.
            serializer: With ``"json"``, the source of the function must be all that it needs.
            max_result_bytes: The limit for the result.

        Raises:
            ConfigurationError: The function cannot travel, or a value is wrong.
        """
        _check_options(serializer, max_result_bytes)
        if serializer == "json":
            source_of(without_partial(function, [], {})[0])

    @classmethod
    def for_reading(
        cls,
        name: str,
        *,
        serializer: Serializer = "json",
        max_result_bytes: int = MAX_RESULT_BYTES,
        allow_cloudpickle: bool = True,
    ) -> FunctionCall:
        """Return a call that can only ``read``, for a process that did not pack it.

        Args:
            name: The function's name, for messages.
            serializer: As for ``pack``, and so are the others.
            max_result_bytes: The limit for the result.
            allow_cloudpickle: Whether a result may be unpickled.
        """
        return cls(name, serializer, max_result_bytes, allow_cloudpickle, {}, None, {}, Requirements())

    @property
    def fingerprint(self) -> str:
        """What equal calls have in common, 64 hex digits: an engine finds the run of an equal call by it.

        It is drawn from the function, its arguments, its modules and its requirements; reads the modules. A
        pickle may differ from process to process, and so does the fingerprint then.
        """
        # With its source, a function is the same on a machine with another Python.
        left_out = {"python"} if self.serializer == "json" else set()
        content = {name: value for name, value in self._content.items() if name not in left_out}
        digest = sha256(json.dumps([content, self._source, self._requirements.text], sort_keys=True).encode())
        for name, path in sorted(self._modules.items()):
            digest.update(f"{name} {sha256(path.read_bytes()).hexdigest()} ".encode())
        return digest.hexdigest()

    @property
    def report_bytes(self) -> int:
        """The most bytes of the message that has the result, for the limit of ``follow``."""
        return self.max_result_bytes + _MESSAGE_HEAD

    def write(self, folder: str | os.PathLike[str], key: str) -> None:
        """Write what the run needs into a folder, which ``configuration`` makes the run's.

        Args:
            folder: A new or empty folder. It holds the arguments: remove it once the run was submitted.
            key: The key of what the run reports, ``report_key(marker)``.
        """
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        # Ignore files above a temporary folder must not leave anything out.
        (root / ".dstackignore").write_text("!*\n", encoding="utf-8")
        content = {**self._content, "key": key, "requirements": self._requirements.text}
        if self._source is not None:
            (root / "source").mkdir()
            (root / "source" / "dstack_function.py").write_text(self._source, encoding="utf-8")
        for name, path in self._modules.items():
            _copy(path, root / "modules" / name)
        for name, path in self._requirements.wheels.items():
            _copy(path, root / WHEELS / name)
        (root / "main.py").write_text(inspect.getsource(main), encoding="utf-8")
        (root / "call.json").write_text(json.dumps(content), encoding="utf-8")

    def configuration(
        self,
        folder: str | os.PathLike[str],
        key: str,
        base: Configuration | None = None,
        *,
        image: str | None = None,
        python: str | None = None,
        commands: Sequence[str] = (),
        registry_auth: RegistryAuth | Mapping[str, str] | None = None,
        nodes: int | None = None,
    ) -> Configuration:
        """Return the configuration of a run that makes the call.

        Args:
            folder: Where ``write`` wrote, as it is called on this machine while the run is submitted.
            key: As for ``write``.
            base: A task to which the call is added behind its commands. Default: an empty one.
            image: The image to run in. It needs Python 3.8 or newer. Default: that of ``base``, else
                dstack's.
            python: The Python version of dstack's own image. Default: that of ``base``; if there is none, no
                image either, and the call is pickled, this Python's.
            commands: What to run before the call, behind the commands of ``base``. Default: nothing.
            registry_auth: ``RegistryAuth`` or a mapping, for a private ``image``. Default: that of ``base``.
            nodes: How many nodes make the call; the first returns its result. Default: that of ``base``.

        Returns:
            The configuration, a task.

        Raises:
            ConfigurationError: ``base`` is not a task, or a value is wrong.

        Example:
            ``task = call.configuration(folder, key, image="python:3.12")``
        """
        base = Task() if base is None else base
        if base.type != "task":
            raise ConfigurationError(f"configuration: expected a task, got a {base.type}.")
        if isinstance(commands, str):
            commands = [commands]
        if not all(isinstance(command, str) for command in commands):
            raise ConfigurationError(f"commands: expected a list of strings, got {list(commands)!r}.")
        if nodes is not None and (isinstance(nodes, bool) or not isinstance(nodes, int) or nodes < 1):
            raise ConfigurationError(f"nodes: expected a whole number from 1 on, got {nodes!r}.")
        image_used = image or base.image
        if python is None and base.python is None and image_used is None and self.serializer == "cloudpickle":
            python = self._content["python"]
        given = {
            "image": image,
            "python": python,
            "registry_auth": registry_auth,
            "nodes": nodes,
            "commands": [*(base.commands or []), *commands, self.command(key, image_used)],
            "files": [*(base.files or []), FileMapping(local_path=os.fspath(folder), path=FOLDER)],
        }
        fields = {name: getattr(base, name) for name in base.model_fields_set}
        fields |= {name: value for name, value in given.items() if value is not None}
        return type(base).model_validate(fields)

    def command(self, key: str, image: str | None = None) -> str:
        """Return the shell command that makes the call, and reports when the run has no Python.

        ``image`` is named in that report. The command has neither the function nor its arguments.
        """
        where = f"the image {image!r}" if image else "the run"
        none = _shell_report(key, f"expected python3 in {where}, got none. Use an image that has it.")
        old = _shell_report(
            key, f"expected Python 3.8 or newer in {where}, got an older one. Use another image."
        )
        program = '"$HOME"' + FOLDER.removeprefix("~") + "/main.py"
        return (
            f"{{ dstack_python=$(command -v python3 || command -v python) || {{ {none}; exit 127; }}; "
            '"$dstack_python" -c "import sys; sys.exit(sys.version_info < (3, 8))" || '
            f'{{ {old}; exit 1; }}; "$dstack_python" -u {program}; }}'
        )

    def read(self, payload: Mapping[str, Any], outcome: Outcome) -> Any:
        """Return what the function returned, from what its run reported.

        Args:
            payload: The payload of kind "function" that has the key of the run, from ``choose_report``.
            outcome: How the run ended.

        Returns:
            The value.

        Raises:
            RemoteFunctionError: The function raised.
            UnusableFunctionError: The call cannot work as it is, for example because JSON cannot carry the
                result, or the image has no Python.
            FunctionSkipped: The function ended with ``dstack_report.skip``.
            RunError: The run ended without success for another reason.
        """
        return value_of(
            payload,
            outcome,
            name=self.name,
            serializer=self.serializer,
            allow_cloudpickle=self.allow_cloudpickle,
        )


def _check_options(serializer: str, max_result_bytes: object) -> None:
    check_choice("serializer", serializer, ("json", "cloudpickle"))
    if isinstance(max_result_bytes, bool) or not isinstance(max_result_bytes, int) or max_result_bytes < 1:
        raise ConfigurationError(f"max_result_bytes: expected 1 byte or more, got {max_result_bytes!r}.")


def _check_size(files: Iterable[Path], rest: int) -> None:
    """Raise ``ConfigurationError`` for more than the server takes, naming the biggest files."""
    given = os.environ.get(_UPLOAD_LIMIT_VARIABLE, "")
    limit = int(given) if given.isdecimal() else _UPLOAD_LIMIT
    sizes = {path: path.stat().st_size for path in files}
    total = (
        _PROGRAM_BYTES
        + rest
        + sum(-(-size // _TAR_BLOCK) * _TAR_BLOCK + _TAR_BLOCK for size in sizes.values())
    )
    if not limit or total <= limit:
        return
    biggest = sorted(sizes, key=lambda path: sizes[path], reverse=True)[:3]
    named = ", ".join([f"{path} ({sizes[path]} bytes)" for path in biggest if sizes[path] > rest])
    named = named or f"the arguments ({rest} bytes)"
    raise ConfigurationError(
        f"function: expected at most {limit} bytes of arguments, modules and wheels, got {total}; the "
        f"biggest: {named}. Put data into a volume or a bucket, and name files that the run does not need in "
        ".dstackignore."
    )


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target)


def _shell_report(key: str, reason: str) -> str:
    """Return commands that report why there is no result, readable for a person and for ``read``."""
    (line,) = main.report_lines(key, {"state": "unusable", "reason": reason})
    # Not ``echo``, which changes backslashes in some shells.
    return f"printf '%s\\n' {shlex.quote(reason)} {shlex.quote(line)}"
