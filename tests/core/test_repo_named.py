"""The ``repos`` of a configuration: one path or one address."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core import ConfigurationError, RepoMapping
from dstack_core._repo.repository import Repository
from dstack_core._wire.code import Clone, Code
from dstack_core._wire.spec import RunOptions, run_spec
from tests.core.repos import clone_pair, write


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
    assert code == Repository.checked(work).pack()
    assert code is not None
    spec = run_spec(configuration, RunOptions(), code=code)
    assert "repos" not in spec["configuration"]
    assert (spec["working_dir"], spec["configuration"]["working_dir"]) == (".", "/workflow")
    assert code_of(str(work), local_repo=True).data == {"repo_type": "local", "repo_dir": str(work)}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([{"local_path": ".", "url": "https://x/y"}], r"either a local_path or a url"),
        ([{"branch": "main"}], r"either a local_path or a url"),
        ([{"local_path": ".", "hash": "abc"}], r"branch and hash go with a url"),
        ([{"url": "https://x/y", "path": "/data"}], r"repos: path '/data' is not supported"),
        ([{"url": "https://x/y", "if_exists": "skip"}], r"if_exists: there is no such field"),
        ([".", "https://x/y"], r"repos: 2 are given; a run starts from one"),
    ],
)
def test_what_a_run_cannot_start_from_is_refused(given: list[Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        loaded(*given)


def test_errors_name_repos_and_show_no_secret(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^repos: '/nowhere' is no directory"):
        code_of("/nowhere")
    with pytest.raises(
        ConfigurationError, match=r"^repos: url: .* its remote is reached over http"
    ) as caught:
        code_of("http://u:s3cr3t@lab.org/r")
    assert "s3cr3t" not in str(caught.value) + repr(loaded("http://u:s3cr3t@lab.org/r"))
    with pytest.raises(ConfigurationError, match=r"^repos: the client has the repo_dir '.*' already"):
        code_of("https://x/y", repo_dir=tmp_path)
