"""The ``repos`` of a configuration: one path or one address."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core import ConfigurationError, RepoMapping
from dstack_core._code.repository import Repository
from dstack_core._wire.code import Clone, Code, RepoPlace
from dstack_core._wire.http_messages import Reply, Request
from dstack_core._wire.spec import run_spec, with_repo_place
from dstack_core._wire.versions import Release
from dstack_core.local import LocalServer
from dstack_core.models.options import SubmitOptions
from tests.core.repos import clone_pair, write


@pytest.fixture
def server_calls() -> Iterator[tuple[list[str], dstack.Client]]:
    """Return a client of an embedded server and the last parts of the paths it requests."""
    paths: list[str] = []
    with LocalServer() as server:
        client = dstack.Client(server_url=server.url, project_name=server.project, user_token=server.token)
        send: Callable[[Request], Reply] = client._transport

        def watch(request: Request) -> Reply:
            parts = request.path.partition("?")[0].split("/")
            paths.append("/".join(parts[4:] if parts[2] == "project" else parts[3:]))
            return send(request)

        client._transport = watch  # type: ignore[assignment]
        yield paths, client


def loaded(*repos: Any) -> list[RepoMapping]:
    configuration = {"type": "task", "commands": ["x"], "repos": list(repos)}
    return [RepoMapping.model_validate(repo) for repo in dstack.load_configuration(configuration).repos or []]


def code_of(*repos: Any, **parameters: Any) -> Code:
    code = Repository.checked(**parameters).pack(loaded(*repos))
    assert code is not None
    return code


@pytest.mark.parametrize(
    ("given", "url", "data"),
    [
        ("https://u:tok@github.com/o/r.git", "https://github.com/o/r.git", {}),
        ("git@github.com:o/r.git", "https://github.com/o/r.git", {}),
        (
            {"url": "https://github.com/o/r", "branch": "dev", "hash": "abc1234", "path": "/workflow"},
            "https://github.com/o/r",
            {"repo_branch": "dev", "repo_hash": "abc1234"},
        ),
    ],
)
def test_an_address_is_cloned_as_it_is(given: Any, url: str, data: dict[str, str]) -> None:
    code = code_of(given)
    assert (code.clone, code.upload) == (Clone(url), None)
    assert code.data == {"repo_type": "remote", "repo_name": "r", **data}
    assert code_of(given, oauth_token="t").clone == Clone(url, oauth_token="t")


def test_a_path_is_that_of_the_file_and_is_treated_as_repo_dir(tmp_path: Path) -> None:
    work = clone_pair(tmp_path)
    write(work, a="changed\n", sub__run="type: task\ncommands: [x]\nrepos: ['..']\n")
    configuration = dstack.load_configuration(work / "sub" / "run")
    code = Repository.checked().pack(configuration.repos or [])
    place = RepoPlace({"local_path": str(work)})
    own = Repository.checked(work).pack()
    assert own is not None
    assert code == dataclasses.replace(own, place=place)
    assert code_of(str(work), local_repo=True).data == {"repo_type": "local", "repo_dir": str(work)}


# What dstack 0.22.5's own RepoSpec reads, except addresses with a port or a login, which it cuts in two.
@pytest.mark.parametrize(
    ("given", "source", "path"),
    [
        (".", ".", "."),
        (".:/x", ".", "/x"),
        ("~/proj:~/x", "~/proj", "~/x"),
        ("../proj:", "../proj", "."),
        ("https://host/a/b", "https://host/a/b", "."),
        ("https://host/a/b:/x", "https://host/a/b", "/x"),
        ("https://host/a/b.git:x/y", "https://host/a/b.git", "x/y"),
        ("git@host:a/b:/x", "git@host:a/b", "/x"),
        ("git@host:a/b.git", "git@host:a/b.git", "."),
        ("ssh://me@host:22/a/b:/x", "ssh://me@host:22/a/b", "/x"),
        ("https://host:8443/a/b:/x", "https://host:8443/a/b", "/x"),
        ("https://u:tok@host/a/b:/x", "https://u:tok@host/a/b", "/x"),
        ("https://[::1]:8443/a/b", "https://[::1]:8443/a/b", "."),
    ],
)
def test_every_short_form_is_read(given: str, source: str, path: str) -> None:
    (repo,) = loaded(given)
    assert (repo.url or repo.local_path, repo.path) == (source, path)
    assert (repo.url is not None) == ("@" in given or "//" in given)


OLD, NEW = (0, 19, 40), (0, 20, 0)
URL = {"url": "https://host/a/b"}


def spec_of(repo: Any, release: Release | None, **configuration: Any) -> dict[str, Any]:
    """Return what is sent of a configuration with that repo."""
    code = code_of(repo)
    assert code.place is not None
    task = dstack.load_configuration({"type": "task", "commands": ["x"], "repos": [repo], **configuration})
    return with_repo_place(run_spec(task, SubmitOptions(), code=code), code.place, release)


@pytest.mark.parametrize(
    ("repo", "working_dir", "sent"),
    [
        (URL, None, {"path": "."}),
        ("https://host/a/b:/x", None, {"path": "/x"}),
        ({**URL, "path": "code", "if_exists": "skip"}, "/here", {"path": "code", "if_exists": "skip"}),
        (URL, "/here", {"path": "."}),
        (URL, "/workflow/src", {"path": "."}),
        (URL, "src", {"path": "/workflow"}),
        ({**URL, "branch": "dev", "hash": "abc"}, None, {"path": ".", "branch": "dev", "hash": "abc"}),
    ],
)
def test_the_code_is_where_dstack_apply_puts_it(repo: Any, working_dir: str | None, sent: Any) -> None:
    given = {} if working_dir is None else {"working_dir": working_dir}
    for release in (NEW, None):
        spec = spec_of(repo, release, **given)
        assert spec["configuration"]["repos"] == [{**URL, **sent}]
        assert spec["repo_dir"] == sent["path"]
        expected = "/workflow/src" if working_dir == "src" else working_dir
        assert spec["configuration"].get("working_dir") == expected


@pytest.mark.parametrize(("working_dir", "sent"), [(None, "/workflow"), ("src", "/workflow/src")])
def test_before_0_20_the_code_is_in_workflow(working_dir: str | None, sent: str) -> None:
    spec = spec_of(URL, OLD, **({} if working_dir is None else {"working_dir": working_dir}))
    assert "repos" not in spec["configuration"]
    assert "repo_dir" not in spec
    assert spec["configuration"]["working_dir"] == sent
    assert spec["working_dir"] == (working_dir or ".")


@pytest.mark.parametrize(
    ("repo", "needs"),
    [
        (URL, False),
        ({**URL, "path": "/workflow"}, False),
        ({**URL, "path": "/x"}, True),
        ({**URL, "if_exists": "error"}, True),
    ],
)
def test_another_place_needs_a_server_that_knows_it(repo: Any, needs: bool) -> None:
    place = code_of(repo).place
    assert place is not None
    assert place.needs == (("repos with path or if_exists",) if needs else ())


def test_a_path_beside_a_relative_working_directory_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"^working_dir: expected an absolute path, as repos has the"
    ):
        spec_of("https://host/a/b:/x", NEW, working_dir="src")


def test_branch_and_hash_of_a_local_path_are_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = clone_pair(tmp_path)
    code = code_of({"local_path": str(work), "branch": "other"})
    assert code.data["repo_branch"] == "main"
    assert "branch and hash are not used with a local_path" in caplog.text


def test_the_servers_version_is_requested_only_for_a_named_repository(server_calls: Any) -> None:
    paths, client = server_calls
    client.runs.submit({"type": "task", "commands": ["true"], "repos": [URL]})
    assert paths == ["get_my_user", "get_info", "repos/get", "repos/init", "runs/apply"]
    paths.clear()
    client.runs.submit({"type": "task", "commands": ["true"], "repos": [URL]})
    assert paths == ["runs/apply"]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([{"local_path": ".", "url": "https://x/y"}], r"expected either local_path or url, got both"),
        ([{"branch": "main"}], r"expected either local_path or url, got neither"),
        ([{"url": "https://x/y", "path": "~me/x"}], r"expected a path such as ~/x, got '~me/x'"),
        (
            [{"url": "https://x/y", "if_exists": "replace"}],
            r"if_exists: expected 'error' or 'skip', got 'replace'",
        ),
        (["a:b:c"], r"expected local_path:path or url:path, got 'a:b:c'\. Write"),
        ([":/x"], r"expected either local_path or url, got neither"),
        ([".", "https://x/y"], r"repos: expected one item, got 2\. A run starts from one"),
    ],
)
def test_what_a_run_cannot_start_from_is_refused(given: list[Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        loaded(*given)


def test_errors_name_repos_and_show_no_secret(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^repos: expected a directory, got '/nowhere'"):
        code_of("/nowhere")
    with pytest.raises(
        ConfigurationError, match=r"^repos: url: .* its remote is reached over http"
    ) as caught:
        code_of("http://u:s3cr3t@lab.org/r")
    assert "s3cr3t" not in str(caught.value) + repr(loaded("http://u:s3cr3t@lab.org/r"))
    with pytest.raises(
        ConfigurationError, match=r"^repos: expected either repos or repo_dir, got both \(repo_dir: '.*'\)"
    ):
        code_of("https://x/y", repo_dir=tmp_path)
