"""Ids and short forms of repositories, compared with dstack's own client in the environment of a real server."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import dstack_core as dstack
from dstack_core import RepoMapping
from dstack_core._code.remote import Remote
from dstack_core._code.repository import Repository
from dstack_core._wire.code import Clone, Code
from dstack_core._wire.spec import run_spec, with_repo_place
from dstack_core.models.options import SubmitOptions
from tests.contract.configurations.clients import JUDGE_VERSION
from tests.contract.git_host import GitHost
from tests.contract.test_code import checkout, git, git_host
from tests.rig.server import RealServer
from tests.rig.server_process import DEFAULT_VERSION, server_python

__all__ = ["checkout", "git_host"]

asks_no_server = pytest.mark.skipif(
    DEFAULT_VERSION != JUDGE_VERSION, reason="no server is asked, and the newest client is the judge"
)
SSH_CONFIG = "Host github-work\n  HostName github.com\n  User me\n  Port 2222\n"
URLS = (
    "https://github.com/o/r.git",
    "https://u:tok@GitHub.com/o/r",
    "https://lab.org:8443/o/r.git",
    "git@github.com:o/r.git",
    "git@github.com:/o/r.git",
    "ssh://me@lab.org:2222/o/r.git",
    "HTTPS://github.com/o/r/",
    "git@github-work:o/r",
    "ssh://github-work/o/r.git",
    "https://github-work/o/r",
    "https://h/a b/\u00dc.git",
    "https://h",
    "https://h/o//r.git",
    "me@h:r",
    "ssh://git@HOST.com:22/o/r",
)
SHORT_FORMS = (
    *(".", ".:/x", "~/proj:~/x", "../proj", "/abs/proj:rel"),
    *("https://host/a/b", "https://host/a/b:/x", "git@host:a/b", "git@host:a/b.git:/x"),
    *("ssh://me@host/a/b:/x",),
)
PROGRAM = """
import json, sys
from dstack._internal.core.models.configurations import RepoSpec
from dstack._internal.core.models.repos.remote import GitRepoURL, RemoteRepo
from dstack._internal.utils.hash import slugify
from dstack._internal.utils.ssh import get_host_config
urls, forms, directory = json.load(sys.stdin)
parsed = [GitRepoURL.parse(url, get_ssh_config=get_host_config) for url in urls]
json.dump(
    {
        "ids": [RemoteRepo.from_url(url).repo_id for url in urls],
        "ssh": [url.as_ssh() for url in parsed],
        "https": [url.as_https() for url in parsed],
        "forms": [json.loads(RepoSpec.parse(form).model_dump_json()) for form in forms],
        "directory": slugify(directory.rpartition("/")[2], directory),
    },
    sys.stdout,
)
"""


class Official(NamedTuple):
    """The results of dstack's own client, and the home directory it ran with."""

    home: str
    results: dict[str, Any]


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Official:
    """Return the addresses as dstack's own client reads them with the same SSH configuration."""
    home = tmp_path_factory.mktemp("home")
    (home / ".ssh").mkdir()
    (home / ".ssh" / "config").write_text(SSH_CONFIG)
    done = subprocess.run(
        [str(server_python(DEFAULT_VERSION)), "-c", PROGRAM],
        input=json.dumps([URLS, SHORT_FORMS, "/home/me/my proj"]),
        env={"PATH": os.environ["PATH"], "HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    return Official(str(home), json.loads(done.stdout))


@pytest.mark.real
@asks_no_server
def test_ids_and_addresses_are_the_same(official: Official, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", official.home)
    for number, url in enumerate(URLS):
        remote = Remote.parse(url, Path("/"))
        code = Code.of_git(remote.name, remote.location, None, None, Clone(remote.as_https()), None)
        assert code.repo_id == official.results["ids"][number], url
        # A second slash at the beginning of the path is left out, because it has no meaning to any server.
        https, ssh = (official.results[kind][number].replace(".com//", ".com/") for kind in ("https", "ssh"))
        assert (remote.as_https(), remote.as_ssh()) == (https, ssh), url
    assert Code.of_directory("/home/me/my proj", None).repo_id == official.results["directory"]


@pytest.mark.real
@asks_no_server
def test_short_forms_are_read_alike(official: Official) -> None:
    for form, theirs in zip(SHORT_FORMS, official.results["forms"], strict=True):
        ours = RepoMapping.model_validate(form)
        assert (ours.local_path, ours.url, ours.path) == (
            *(theirs["local_path"], theirs["url"], theirs["path"]),
        ), form
        assert (ours.if_exists or "error") == theirs["if_exists"]


SPEC_PROGRAM = """
import json, sys
from types import SimpleNamespace
from dstack._internal.core.models.configurations import parse_run_configuration
from dstack._internal.core.models.repos.remote import RemoteRepo
from dstack.api._public.runs import RunCollection
directory, configuration = json.load(sys.stdin)
server = SimpleNamespace(runs=SimpleNamespace(get_plan=lambda run_spec, **rest: run_spec))
runs = RunCollection(server, "main", None)
spec = runs.get_run_plan(parse_run_configuration(configuration), RemoteRepo.from_dir(directory))
print(spec.model_dump_json())
"""


@pytest.mark.real
@asks_no_server
@pytest.mark.parametrize(
    "more", [{}, {"working_dir": "/here"}, {"path": "/x"}, {"path": "code", "if_exists": "skip"}]
)
def test_both_clients_put_the_code_in_the_same_place(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, str]
) -> None:
    monkeypatch.setenv("HOME", str(checkout.parent))
    git(checkout, "config", "user.name", "a")
    git(checkout, "config", "user.email", "a@b.c")
    directory = {"working_dir": more["working_dir"]} if "working_dir" in more else {}
    placed = {key: value for key, value in more.items() if key != "working_dir"}
    repo = {"local_path": str(checkout), **placed}
    configuration = {"type": "task", "commands": ["true"], "repos": [repo], **directory}
    done = subprocess.run(
        [str(server_python(DEFAULT_VERSION)), "-c", SPEC_PROGRAM],
        input=json.dumps([str(checkout), configuration]),
        env={"PATH": os.environ["PATH"], "HOME": str(checkout.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = json.loads(done.stdout.splitlines()[-1])
    loaded = dstack.load_configuration(configuration)
    code = Repository.checked().pack(loaded.repos or ())
    assert code is not None
    assert code.place is not None
    ours = with_repo_place(run_spec(loaded, SubmitOptions(), code=code), code.place, (0, 22, 5))
    for key in ("repo_id", "repo_data", "repo_dir"):
        assert ours[key] == theirs[key]
    assert ours["configuration"].get("working_dir") == theirs["configuration"]["working_dir"]
    assert {"if_exists": "error", **ours["configuration"]["repos"][0]} == {
        key: value for key, value in theirs["configuration"]["repos"][0].items() if value is not None
    }


@pytest.mark.real
def test_credentials_stored_by_dstack_init_let_a_run_clone(real_server: RealServer, tmp_path: Path) -> None:
    """Need no more than a user's `dstack init`: neither a submit nor `init=False` needs credentials of its own."""
    if real_server.release < (0, 20, 0):
        pytest.skip("the command line of the newest release does not speak to this server")
    with GitHost(tmp_path) as host:
        git(tmp_path, "init", "--quiet", "--bare", f"{tmp_path.name}.git")
        git(tmp_path, "clone", "--quiet", f"{tmp_path}/{tmp_path.name}.git", "work")
        work = tmp_path / "work"
        git(work, "checkout", "--quiet", "-b", "main")
        (work / "kept.txt").write_text("kept\n")
        git(work, "add", ".")
        git(work, "commit", "--quiet", "-m", "pushed")
        git(work, "push", "--quiet", "-u", "origin", "main")
        url = host.url(tmp_path / f"{tmp_path.name}.git")
        git(work, "remote", "set-url", "origin", url)
        _dstack_init(real_server, tmp_path / "home", url, host.key)
        target: dict[str, Any] = {
            "server_url": real_server.url,
            "project_name": real_server.project,
            "user_token": real_server.token,
        }
        for init in (True, False):
            with dstack.Client.from_config(work, init=init, **target) as client:
                task = {"type": "task", "commands": ["cat kept.txt"], "fleets": [real_server.fleet]}
                run = client.runs.submit({**task, "resources": {"gpu": 0, "disk": None}})
                outcome = run.wait(180, poll_interval=0.5)
                assert outcome.succeeded, outcome.message
                assert b"".join(run.logs()).decode().split() == ["kept"]


def _dstack_init(server: RealServer, home: Path, url: str, key: str) -> None:
    """Run dstack's own `init` as a user with a key would."""
    (home / ".dstack").mkdir(parents=True)
    project = {"name": server.project, "url": server.url, "token": server.token, "default": True}
    (home / ".dstack" / "config.yml").write_text(yaml.safe_dump({"projects": [project]}))
    key_file = home / "key"
    key_file.touch(mode=0o600)
    key_file.write_text(key)
    program = server_python(DEFAULT_VERSION).parent / "dstack"
    done = subprocess.run(
        [str(program), "init", "-P", url, "--git-identity", str(key_file)],
        env={"PATH": os.environ["PATH"], "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
