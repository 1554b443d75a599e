"""Build run specs: the rules of PROTOCOL 2.4 and the mapping of PROTOCOL 3.2.

The problem: servers from 0.18.44 to 0.22.5 must do the same for one spec, although keys, defaults and the
meaning of values changed between them. A server refuses keys that it does not know, and bare numbers mean an
exact size, not a minimum.

The idea: only keys that were set are sent, so that a spec needs no newer server than what it uses
(``versions``). Where two versions read different keys, both are sent (the working directory). Values are
written in the form that every version reads. Options of a submit override the configuration's keys:
scheduling options go into the configuration, which every version reads.

Invariants: the result is plain JSON. A mapping that a user writes for a key passes through unchanged, so what
today's server documents works. A wrong value raises one ``ConfigurationError`` before anything is sent.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dstack_core._wire.code import Code, RepoPlace
from dstack_core._wire.versions import Release, places_repos
from dstack_core.errors import ConfigurationError
from dstack_core.models.base import Model
from dstack_core.models.configurations import Configuration
from dstack_core.models.cost_limits import CostLimit, check_max_cost
from dstack_core.models.options import SubmitOptions, check_duration
from dstack_core.models.profiles import Profile, RetryPolicy, read_price
from dstack_core.models.resources import GPU, Resources, parse_gpu
from dstack_core.models.statuses import SpotPolicy
from dstack_core.models.tags import check_tags

# The server's own rule (PROTOCOL 1.4): checked here, the error comes before anything was uploaded.
_RUN_NAME = re.compile(r"[a-z][a-z0-9-]{1,40}")
_CODE_DIR = "/workflow"
# Seconds to wait for capacity if ``RetryPolicy`` has no limit, as in dstack 0.11.3 (PROTOCOL 3.1). Another
# number breaks the documented meaning of ``retry=True``.
_DEFAULT_CAPACITY_WAIT = 3600
_RETRY_KEYS = {"on_events", "duration"}


def check_run_name(name: str) -> str:
    """Return ``name``, or raise ``ConfigurationError`` (PROTOCOL 1.4: the server's own rule)."""
    if not isinstance(name, str) or not _RUN_NAME.fullmatch(name):
        raise ConfigurationError(
            f"run_name: expected 2 to 41 lower-case letters, digits and dashes, a letter first, got {name!r}."
        )
    return name


def run_spec(
    configuration: Configuration,
    options: SubmitOptions,
    *,
    run_name: str | None = None,
    marker: str | None = None,
    code: Code | None = None,
) -> dict[str, Any]:
    """Return the run_spec that every supported server takes; only keys that were set are sent.

    The caller still has to set ``ssh_key_pub``, which may take a request (PROTOCOL 2.4.3). Raises
    ``ConfigurationError`` on values no server takes.
    """
    # The full form, with a repository and a profile: the one form that every server reads (PROTOCOL 2.4.2).
    spec: dict[str, Any] = {
        "repo_id": "none",
        "repo_data": {"repo_type": "virtual"},
        "configuration": _configuration(configuration, options),
        "profile": _profile(options.get("profile")),
    }
    if run_name is not None:
        spec["run_name"] = check_run_name(run_name)
    if marker is not None:
        spec["configuration_path"] = marker
    if code is not None:
        spec |= {"repo_id": code.repo_id, "repo_data": code.data}
        if code.upload is not None:
            spec["repo_code_hash"] = code.upload.sha256
    working_dir = options.get("working_dir")
    if working_dir is None:
        working_dir = spec["configuration"].get("working_dir")
    if code is not None and code.place is not None:
        spec["repo_dir"] = _repo_dir(code.place, working_dir)
    elif code is not None and working_dir is None:
        working_dir = "."
    if isinstance(working_dir, str):
        # Which of the two counts depends on the server's version (PROTOCOL 2.4.5); both together always do.
        spec["working_dir"] = _relative(working_dir)
        spec["configuration"]["working_dir"] = _absolute(working_dir)
    return spec


def with_repo_place(spec: Mapping[str, Any], place: RepoPlace, release: Release | None) -> dict[str, Any]:
    """Return the spec with the code where ``repos`` of the configuration wants it (PROTOCOL 1.3).

    It does what dstack's own client of the server's time does: before 0.20 the code lies in ``/workflow`` and
    commands start there; since then it lies in ``path``, by default the working directory, which is the
    image's own by default.
    """
    spec = dict(spec)
    repo_dir = spec.pop("repo_dir")
    configuration = dict(spec["configuration"])
    if places_repos(release):
        spec["repo_dir"] = repo_dir
        options = {"if_exists": place.if_exists} if place.if_exists else {}
        configuration["repos"] = [{**place.source, "path": repo_dir, **options}]
    elif configuration.get("working_dir") is None:
        spec["working_dir"] = "."
        configuration["working_dir"] = _CODE_DIR
    return {**spec, "configuration": configuration}


def with_files(spec: Mapping[str, Any], archives: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return the spec with uploaded archives, each an id and a path in the container (PROTOCOL 1.3)."""
    return {**spec, "file_archives": [{"id": archive, "path": path} for archive, path in archives]}


def keys_that_were_set(configuration: Model) -> dict[str, Any]:
    """Return a configuration as JSON data, without the keys that were not set (PROTOCOL 2.4.4)."""
    typed = set(type(configuration).model_fields)
    dumped = configuration.model_dump(mode="json")
    # A key that is passed through keeps its null: for today's server null may differ from absence.
    wire = {key: value for key, value in dumped.items() if value is not None or key not in typed}
    _write_off(wire)
    return wire


def _configuration(configuration: Configuration, options: SubmitOptions) -> dict[str, Any]:
    wire = keys_that_were_set(configuration)
    wire.pop("name", None)
    # What it names is in repo_data, which every server reads (PROTOCOL 1.3).
    wire.pop("repos", None)
    resources = options.get("resources")
    if resources is None:
        resources = configuration.resources
    if resources is not None:
        wire["resources"] = any_resources(resources)
    for name, write in _WRITERS.items():
        value = options.get(name)
        written = None if value is None else write(value)
        if written is not None:
            wire[_KEYS.get(name, name)] = written
    max_cost = options.get("max_cost")
    if max_cost is not None:
        wire["env"] = {**(wire.get("env") or {}), **CostLimit(check_max_cost(max_cost)).env}
    tags = _tags(configuration, options)
    return wire if tags is None else {**wire, "tags": tags}


def _tags(configuration: Configuration, options: SubmitOptions) -> dict[str, str] | None:
    """Return the tags to write into the configuration; None to leave it as it is.

    A server takes the configuration's tags instead of the profile's, so these are written with the option's.
    """
    profile = options.get("profile")
    inherited = profile.tags if isinstance(profile, Profile) else None
    own = inherited if configuration.tags is None else configuration.tags
    given = options.get("tags")
    checked = None if own is None else check_tags("tags", own)
    return {**check_tags("tags", given), **(checked or {})} if given not in (None, False) else None


def with_default_tags(spec: Mapping[str, Any], tags: Mapping[str, str]) -> dict[str, Any]:
    """Return the spec with these tags too; a key that it has keeps its value."""
    return _with_tags(spec, {**tags, **_tags_of(spec)})


def with_tags_kept(
    spec: Mapping[str, Any], tags: Mapping[str, str], current: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the spec that updates a run: it keeps the default tags that it was submitted with.

    No server changes the tags of a run in place (PROTOCOL 1.4), and those of a task differ every time.
    """
    kept = {key: value for key, value in _tags_of(current).items() if key in tags}
    return _with_tags(spec, {**kept, **_tags_of(spec)})


def _tags_of(spec: Mapping[str, Any]) -> Mapping[str, str]:
    of_profile = (spec.get("profile") or {}).get("tags") or {}
    own = (spec.get("configuration") or {}).get("tags")
    return of_profile if own is None else own


def _with_tags(spec: Mapping[str, Any], tags: Mapping[str, str]) -> dict[str, Any]:
    # What has none of its own stays as it is, so that a spec needs no newer server than what it uses.
    if dict(tags) == dict(_tags_of(spec)):
        return dict(spec)
    return {**spec, "configuration": {**spec["configuration"], "tags": dict(tags)}}


def _profile(profile: str | Profile | None) -> dict[str, Any]:
    if not isinstance(profile, Profile):
        return {"name": profile or "default"}
    dumped = profile.model_dump(mode="json", exclude_unset=True)
    wire = {"name": profile.name, **{key: value for key, value in dumped.items() if value is not None}}
    _write_off(wire)
    return wire


def _write_off(wire: dict[str, Any]) -> None:
    """Write an ``idle_duration`` of "off" in the form that every server reads: 0.18.44 refuses the text."""
    if wire.get("idle_duration") == "off":
        wire["idle_duration"] = False


def _spot_policy(policy: SpotPolicy | str) -> str:
    try:
        return SpotPolicy(policy).value
    except ValueError:
        known = ", ".join(repr(member.value) for member in SpotPolicy)
        raise ConfigurationError(f"spot_policy: expected one of {known}, got {policy!r}.") from None


def _retry(policy: Any) -> dict[str, Any] | bool | None:
    """Return ``retry`` for a ``RetryPolicy``, or for what YAML has there; None to leave it as it is.

    This is the only place that knows the forms; workflow engines pass on what they are given.
    """
    # A mapping with the fields of ``RetryPolicy`` means the same as the object: engines pass on plain data.
    # ``on_events`` alone is the form of YAML, which passes through.
    given = set(policy) if isinstance(policy, Mapping) else set()
    if given <= set(RetryPolicy.model_fields) and not given <= _RETRY_KEYS:
        try:
            policy = RetryPolicy.model_validate(policy)
        except ConfigurationError as error:
            raise ConfigurationError(error.message.replace("RetryPolicy", "retry_policy", 1)) from None
    if isinstance(policy, RetryPolicy):
        duration = policy.limit or _DEFAULT_CAPACITY_WAIT
        events = list(policy.on_events or ["no-capacity"])
        return {"on_events": events, "duration": duration} if policy.retry else None
    if isinstance(policy, bool):
        return policy
    if isinstance(policy, Mapping) and set(policy) <= _RETRY_KEYS:
        return dict(policy)
    raise ConfigurationError(
        'retry_policy: expected a RetryPolicy, True or False, a dict such as {"retry": True, "limit": "1h"}, '
        f'or one as in YAML such as {{"on_events": ["no-capacity"], "duration": "1h"}}, got {policy!r}.'
    )


def _max_duration(duration: int | str) -> int | str:
    try:
        check_duration(duration, off=True)
    except ValueError as error:
        raise ConfigurationError(f"max_duration: {error}") from None
    return duration


def _backends(backends: Any) -> list[str]:
    is_list = isinstance(backends, Sequence) and not isinstance(backends, str | bytes)
    if not is_list or not all(isinstance(name, str) and name.strip() for name in backends):
        raise ConfigurationError(f'backends: expected a list such as ["aws", "gcp"], got {backends!r}.')
    return list(backends)


def _price(price: Any) -> float:
    try:
        return read_price(price)
    except ValueError as error:
        raise ConfigurationError(f"max_price: {error}.") from None


# How an option of ``SubmitOptions`` is checked and written into the configuration, where it has the same key
# unless ``_KEYS`` names another. ``run_spec`` writes ``resources``, ``working_dir`` and ``profile``; ``env``
# and ``args`` are filled in before (``filling``).
_WRITERS: dict[str, Callable[[Any], Any]] = {
    "spot_policy": _spot_policy,
    "retry_policy": _retry,
    "max_duration": _max_duration,
    "max_price": _price,
    "backends": _backends,
}
_KEYS = {"retry_policy": "retry"}


def _repo_dir(place: RepoPlace, working_dir: str | None) -> str:
    """Return the directory of the code; a relative working directory is below it."""
    if working_dir is None or working_dir.startswith(("/", "~")):
        return place.path
    if place.path in (".", _CODE_DIR):
        return _CODE_DIR
    raise ConfigurationError(
        f"working_dir: expected an absolute path, as repos has the path {place.path!r}, got {working_dir!r}."
    )


def _absolute(working_dir: str) -> str:
    """Resolve a relative path against the code's directory (PROTOCOL 2.4.5).

    The runner expands a tilde: it knows the home of the run's user, and of no other (dstack 0.22.5).
    """
    if working_dir.startswith("~"):
        if working_dir != "~" and not working_dir.startswith("~/"):
            raise ConfigurationError(
                f"working_dir: expected a path such as ~/x, got {working_dir!r}. "
                "A run knows the home of its own user only; write another one out."
            )
        return working_dir
    if working_dir.startswith("/"):
        return working_dir
    return _CODE_DIR if working_dir in ("", ".") else f"{_CODE_DIR}/{working_dir.removeprefix('./')}"


def _relative(working_dir: str) -> str:
    """Undo ``_absolute`` below the code's directory: servers before 0.19 take nothing else there."""
    if working_dir == _CODE_DIR or working_dir.startswith(f"{_CODE_DIR}/"):
        return posixpath.relpath(working_dir, _CODE_DIR)
    return working_dir or "."


def any_resources(resources: Any) -> dict[str, Any]:
    """Write ``Resources`` with minimums; a mapping and a short form mean what they mean in YAML."""
    if isinstance(resources, Resources):
        return _resources(resources)
    if isinstance(resources, Mapping):
        return dict(resources)
    try:
        if isinstance(resources, bool) or not isinstance(resources, str | int):
            raise ValueError(f'expected Resources, a mapping, or a GPU such as "24GB..", got {resources!r}')
        GPU.model_validate(parse_gpu(resources))
    except ValueError as error:
        raise ConfigurationError(f"resources: {error}.") from None
    return {"gpu": resources}


def _resources(resources: Resources) -> dict[str, Any]:
    wire: dict[str, Any] = {"disk": _at_least_size(resources.disk) if resources.disk is not None else None}
    if isinstance(resources.gpu, GPU):
        wire["gpu"] = _gpu(resources.gpu)
    if resources.memory is not None:
        wire["memory"] = _at_least_size(resources.memory)
    if resources.shm_size is not None:
        wire["shm_size"] = _size(resources.shm_size)
    if resources.cpu is not None:
        wire["cpu"] = _at_least(str(resources.cpu))
    return wire


def _gpu(gpu: GPU) -> dict[str, Any]:
    count = "1" if gpu.count is None else str(gpu.count)
    # "0.." would be any number of GPUs; who writes 0 wants none.
    wire: dict[str, Any] = {"count": count if count == "0" else _at_least(count)}
    if gpu.name is not None:
        wire["name"] = [gpu.name] if isinstance(gpu.name, str) else list(gpu.name)
    if gpu.memory is not None:
        wire["memory"] = _at_least_size(gpu.memory)
    if gpu.vendor is not None:
        wire["vendor"] = gpu.vendor
    return wire


def _size(size: int | str) -> str:
    """Write a size as the server reads it: documented ints are MB, the server's are GB (PROTOCOL 3.1)."""
    return f"{size}MB" if isinstance(size, int) else size


def _at_least_size(size: int | str) -> str:
    return _at_least(_size(size))


def _at_least(value: str) -> str:
    """Turn a bare number into a minimum; today's servers read it as an exact one (PROTOCOL 2.4.6)."""
    # A CPU may be written as "arm:4", and an architecture may stand alone.
    architecture, colon, count = value.rpartition(":")
    if count in ("x86", "arm"):
        return value
    return value if ".." in value else f"{architecture}{colon}{count}.."
