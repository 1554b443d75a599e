"""Ids and short forms of repositories, held against dstack's own client in the environment of a real server."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dstack_core import RepoMapping
from dstack_core._repo.remote import Remote
from dstack_core._wire.code import Clone, Code
from tests.rig.server_process import DEFAULT_VERSION, server_python

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
    """What dstack's own client says, and the home it was in."""

    home: str
    says: dict[str, Any]


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Official:
    """Return what dstack's own client makes of the addresses, with the same SSH configuration."""
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
def test_ids_and_addresses_are_the_same(official: Official, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", official.home)
    for number, url in enumerate(URLS):
        remote = Remote.parse(url, Path("/"))
        code = Code.of_git(remote.name, remote.location, None, None, Clone(remote.as_https()), None)
        assert code.repo_id == official.says["ids"][number], url
        # A second slash at the beginning of the path is left out: no server means anything by it.
        https, ssh = (official.says[kind][number].replace(".com//", ".com/") for kind in ("https", "ssh"))
        assert (remote.as_https(), remote.as_ssh()) == (https, ssh), url
    assert Code.of_directory("/home/me/my proj", None).repo_id == official.says["directory"]


@pytest.mark.real
def test_short_forms_are_read_alike(official: Official) -> None:
    for form, theirs in zip(SHORT_FORMS, official.says["forms"], strict=True):
        ours = RepoMapping.model_validate(form)
        assert (ours.local_path, ours.url, ours.path) == (
            *(theirs["local_path"], theirs["url"], theirs["path"]),
        ), form
        assert (ours.if_exists or "error") == theirs["if_exists"]
