"""Which server has what: the one table of first versions (PROTOCOL 2.2).

The problem: servers from 0.18.44 to today are supported. An old one rejects a key that it does not know,
usually with a 422 that names neither the key's first version nor the server's; some values it accepts and
misreads.

The idea: a run_spec is searched for what not every supported server has (``needs_of``): keys, and forms of
values that are newer than their key. ``check`` compares these needs with the server's version and names all
that are missing in one error.

Invariants: a spec without needs is accepted by every supported server, so it is sent without asking for the
version. An unknown version (a server that runs from its sources) never stops a submission: the server
decides. The first versions were read release by release, and those of keys tried on real servers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

from dstack_core.errors import ProtocolError, RequestRejectedError, ServerError, UnsupportedServerError

Release: TypeAlias = tuple[int, int, int]

# The first release that takes the run_spec of today's clients unchanged and finds runs by id (PROTOCOL 2.3).
OLDEST: Release = (0, 18, 44)

# The newest release that this package was tested with.
NEWEST: Release = (0, 22, 5)

# The first release whose schema has the key, read release by release. Tried on real servers: 0.18.44
# refuses every one of them with 422; 0.19.40 all from 0.20 on, 0.20.24 all from 0.20.25 on; 0.22.5 takes all.
# Keys that 0.18.44 has (volumes, nodes, regions, instance_types, privileged, utilization_policy,
# single_branch, idle_duration, stop_duration, ...) need no line here.
_KEYS: Mapping[str, Release] = {
    "fleets": (0, 19, 3),
    "rate_limits": (0, 19, 4),
    "tags": (0, 19, 5),
    "shell": (0, 19, 5),
    "priority": (0, 19, 10),
    "startup_order": (0, 19, 12),
    "stop_criteria": (0, 19, 12),
    "docker": (0, 19, 16),
    "files": (0, 19, 17),
    "schedule": (0, 19, 21),
    "probes": (0, 19, 22),
    "repos": (0, 19, 26),
    "backend_options": (0, 20, 22),
    "instances": (0, 20, 25),
    "dstack": (0, 20, 28),
}
_OTHERS: Mapping[str, Release] = {
    # Before it the reference stays in the text as it is and reaches the command.
    "secrets": (0, 19, 17),
    "events": (0, 20, 0),
    # Before it, a run that names no fleet gets one of its own.
    "runs on fleets only": (0, 20, 0),
    "auto_cleanup_duration": (0, 19, 19),
    "max_offers": (0, 19, 5),
    # Older servers know a request for offers by its command alone.
    "for_offers_only": (0, 21, 0),
    "in-place update of a fleet": (0, 19, 6),
    "project secrets": (0, 19, 17),
    "repos with path or if_exists": (0, 20, 0),
    "python 3.14": (0, 21, 0),
    "python 3.15": (0, 22, 5),
    # Relative to /workflow before it, and the runner refuses what lies elsewhere.
    "working_dir outside of /workflow": (0, 19, 27),
    "retry without on_events": (0, 19, 0),
    "replicas in groups": (0, 20, 7),
    "groups of a task": (0, 21, 2),
    "groups of a service": (0, 21, 3),
    "https: auto": (0, 20, 12),
    "gateway: true": (0, 20, 1),
    "a dev-environment without ide": (0, 20, 14),
    "cpu with an architecture": (0, 19, 8),
}
_SINCE = {**_KEYS, **_OTHERS}
# Before it the code always lies in ``/workflow``, whatever ``repos`` names.
_REPOS_PLACED: Release = (0, 20, 0)
_SECRET = re.compile(r"\$\{\{\s*secrets\.")
_ARCHITECTURE = re.compile(r"[a-z]")
_CODE_DIR = "/workflow"
_RELEASE = re.compile(r"(\d+)\.(\d+)\.(\d+)")


def parse_release(text: Any) -> Release | None:
    """Read a server's version; None for anything else: a server that runs from its sources reports null."""
    found = _RELEASE.match(text) if isinstance(text, str) else None
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


def support_of(release: Release | None) -> Literal["unknown", "too old", "tested", "newer"]:
    """Return whether this package supports a server's version."""
    if release is None:
        return "unknown"
    if release < OLDEST:
        return "too old"
    return "newer" if release > NEWEST else "tested"


def release_text(release: Release) -> str:
    """Return a version as it is written, such as ``0.22.5``."""
    return ".".join(map(str, release))


def needs_of(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what a run_spec uses that not every supported server has."""
    configuration = spec["configuration"]
    profile = spec["profile"]
    needs = [key for key in _KEYS if key in configuration or key in profile]
    needs += [name for name, used in _forms(configuration, profile) if used]
    return tuple(needs)


def _forms(configuration: Mapping[str, Any], profile: Mapping[str, Any]) -> Iterable[tuple[str, bool]]:
    """Return each form of a value that not every server reads, and whether the spec uses it."""
    for version in ("3.14", "3.15"):
        yield f"python {version}", configuration.get("python") == version
    texts = [*_values(configuration.get("env")), *_values(configuration.get("registry_auth"))]
    yield "secrets", any(isinstance(text, str) and _SECRET.search(text) for text in texts)
    # The slash ends the last part of the path, so that /workflow-2 does not count as below /workflow.
    directory = str(configuration.get("working_dir") or _CODE_DIR)
    yield "working_dir outside of /workflow", not f"{directory}/".startswith(f"{_CODE_DIR}/")
    retries = [configuration.get("retry"), profile.get("retry")]
    yield (
        "retry without on_events",
        any(isinstance(each, Mapping) and not each.get("on_events") for each in retries),
    )
    yield "replicas in groups", isinstance(configuration.get("replicas"), list | tuple)
    for kind in ("task", "service"):
        yield f"groups of a {kind}", "groups" in configuration and configuration["type"] == kind
    yield "https: auto", configuration.get("https") == "auto"
    yield "gateway: true", configuration.get("gateway") is True
    is_bare = configuration["type"] == "dev-environment" and not configuration.get("ide")
    yield "a dev-environment without ide", is_bare
    cpu = (configuration.get("resources") or {}).get("cpu")
    yield (
        "cpu with an architecture",
        (isinstance(cpu, str) and bool(_ARCHITECTURE.search(cpu)))
        or (isinstance(cpu, Mapping) and "arch" in cpu),
    )


def places_repos(release: Release | None) -> bool:
    """Return whether a server puts the code where ``repos`` of the configuration names."""
    # A server without a version runs from its sources, so it is taken for a new one.
    return release is None or release >= _REPOS_PLACED


def check(needs: Iterable[str], release: Release | None, server_url: str) -> None:
    """Raise ``UnsupportedServerError`` when a server of that release lacks a need, or is too old."""
    if release is None:
        return
    server = f"this server is {_text(release)} ({server_url})"
    if release < OLDEST:
        raise UnsupportedServerError(
            f"dstack {_text(OLDEST)} or newer is needed, {server}. Upgrade the server."
        )
    lacking = [need for need in needs if release < _SINCE[need]]
    if lacking:
        needed = ", ".join(f"{need}: needs dstack >= {_text(_SINCE[need])}" for need in lacking)
        raise UnsupportedServerError(f"{needed}, {server}. Remove what needs it, or upgrade the server.")


def lacks(need: str, release: Release | None) -> bool:
    """Return whether a server is known to lack a need."""
    return release is not None and release < _SINCE[need]


def may_mean_an_old_server(error: ServerError) -> bool:
    """Return whether a refusal is one for what a server does not know: 404, 405 or 422."""
    if isinstance(error, ProtocolError):
        return error.status == 404
    if isinstance(error, RequestRejectedError):
        return error.status == 422
    # One without a status already names what is needed.
    return isinstance(error, UnsupportedServerError) and error.status is not None


def explain(
    error: ServerError, needs: Iterable[str], release: Release | None, server_url: str
) -> ServerError:
    """Return what a refusal means now that the server's release is known; unknown, the refusal itself."""
    if release is None:
        return error
    try:
        check(needs, release, server_url)
    except UnsupportedServerError as unsupported:
        return unsupported
    text = f"{error.message} (this server is dstack {_text(release)})"
    if isinstance(error, RequestRejectedError):
        return RequestRejectedError(text, code=error.code, status=error.status)
    return UnsupportedServerError(f"{server_url} runs dstack {_text(release)}, which does not have this call")


def _values(mapping: Any) -> Iterable[Any]:
    return mapping.values() if isinstance(mapping, Mapping) else ()


def _text(release: Release) -> str:
    return ".".join(map(str, release))
