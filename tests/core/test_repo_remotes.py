"""Addresses of remotes: how a run clones them, and the ids that dstack's own client gives them."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from dstack_core import ConfigurationError
from dstack_core._code.credentials import GitCredentials, clone_of
from dstack_core._code.remote import CannotCloneError, Remote
from dstack_core._code.repository import Repository
from dstack_core._wire.code import Clone, Code
from tests.core.repos import REMOTE, clone_pair, commit, git, write
from tests.core.test_repo_credentials import TOKEN, key_text

__all__ = ["key_text"]

SSH_CONFIG = """
Host github-work
  HostName github.com
  User me
  Port 2222
Host other
  HostName ssh.other.example
Host *
  ServerAliveInterval 60
"""


def parse(url: str) -> Remote:
    return Remote.parse(url, Path("/"))


def repo_id(url: str) -> str:
    remote = parse(url)
    return Code.of_git(remote.name, remote.location, None, None, Clone(remote.as_https()), None).repo_id


@pytest.fixture
def ssh_config() -> None:
    path = Path.home() / ".ssh" / "config"
    path.parent.mkdir()
    path.write_text(SSH_CONFIG)


# What dstack 0.22.5's own RemoteRepo and its GitRepoURL give; the rule is the same since 0.18.44.
@pytest.mark.usefixtures("ssh_config")
@pytest.mark.parametrize(
    ("url", "dstacks_id", "ssh", "https"),
    [
        ("https://github.com/o/r.git", "r-gmeqilzi", "git@github.com/o/r.git", "https://github.com/o/r.git"),
        ("https://u:ghp_s3cr3t@GitHub.com/o/r", "r-gmeqilzi", "git@github.com/o/r", "https://github.com/o/r"),
        ("https://lab.org:8443/o/r.git", "r-pauq1ujh", "git@lab.org/o/r.git", "https://lab.org:8443/o/r.git"),
        ("git@github.com:o/r.git", "r-gmeqilzi", "git@github.com/o/r.git", "https://github.com/o/r.git"),
        ("git@github.com:/o/r.git", "r-pys4exfn", "git@github.com/o/r.git", "https://github.com/o/r.git"),
        ("ssh://me@lab.org:2222/o/r.git", "r-pauq1ujh", "me@lab.org:2222/o/r.git", "https://lab.org/o/r.git"),
        ("HTTPS://github.com/o/r/", "r-gmeqilzi", "git@github.com/o/r/", "https://github.com/o/r/"),
        ("ssh://git@[::1]:22/o/r", "r-rs6bqled", "git@[::1]:22/o/r", "https://[::1]/o/r"),
        ("git@github-work:o/r", "r-gmeqilzi", "git@github.com:2222/o/r", "https://github.com/o/r"),
        (
            "ssh://github-work/o/r.git",
            "r-gmeqilzi",
            "me@github.com:2222/o/r.git",
            "https://github.com/o/r.git",
        ),
        ("https://github-work/o/r", "r-kwumwsj5", "me@github-work:2222/o/r", "https://github-work/o/r"),
        ("https://h/a b/Ü.git", "%C3%9C-i2krf8hh", "git@h/a%20b/%C3%9C.git", "https://h/a%20b/%C3%9C.git"),
        ("https://h", "unknown-cl6kfq5q", "git@h/", "https://h/"),
        ("https://h/o/r.git.git", "r.git-ken3nq8d", "git@h/o/r.git.git", "https://h/o/r.git.git"),
        ("me@h:r", "r-8ktnuokk", "me@h/r", "https://h/r"),
        ("ssh://git@HOST.com:22/o/r", "r-e8a1j63a", "git@host.com:22/o/r", "https://host.com/o/r"),
    ],
)
def test_ids_and_addresses_are_those_of_dstacks_own_client(
    url: str, dstacks_id: str, ssh: str, https: str, key_text: str
) -> None:
    remote = parse(url)
    assert repo_id(url) == dstacks_id
    assert clone_of(remote, GitCredentials()) == Clone(https)
    assert clone_of(remote, GitCredentials(oauth_token=TOKEN)) == Clone(https, oauth_token=TOKEN)
    with_key = clone_of(remote, GitCredentials(private_key=key_text))
    assert with_key == Clone(f"ssh://{ssh}", private_key=key_text)
    assert TOKEN not in repr(remote)


@pytest.mark.parametrize(
    ("url", "https", "ssh"),
    [
        ("lab.org:o/r.git", "https://lab.org/o/r.git", "ssh://git@lab.org/o/r.git"),
        ("git://lab.org/o/r.git", "https://lab.org/o/r.git", "ssh://git@lab.org/o/r.git"),
        ("ssh://me:ghp_s3cr3t@lab.org/o/r", "https://lab.org/o/r", "ssh://me@lab.org/o/r"),
        ("git@[::1]:o/r", "https://[::1]/o/r", "ssh://git@[::1]/o/r"),
    ],
)
def test_forms_that_only_git_takes_are_read_too(url: str, https: str, ssh: str) -> None:
    assert (parse(url).as_https(), parse(url).as_ssh()) == (https, ssh)


@pytest.mark.parametrize(
    "url", ["http://u:ghp_s3cr3t@lab.org/o/r", "s3://ghp_s3cr3t@x/y", "https://x:ghp_s3cr3t/y"]
)
def test_addresses_no_run_can_clone_are_refused_without_showing_them(url: str) -> None:
    with pytest.raises(CannotCloneError) as caught:
        parse(url)
    assert TOKEN not in str(caught.value)
    with pytest.raises(
        ConfigurationError, match=r"^repos: url: expected a repository .* Give an https"
    ) as raised:
        Repository.checked().pack([{"url": url}])
    assert TOKEN not in str(raised.value)


def test_a_directory_has_the_id_that_dstacks_own_client_gives_it() -> None:
    # dstack 0.19.40: LocalRepo(repo_dir="/home/me/my proj").repo_id
    assert Code.of_directory("/home/me/my proj", None).repo_id == "my proj-llop6jx5"


def test_an_ssh_configuration_that_cannot_be_read_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    (Path.home() / ".ssh").mkdir()
    (Path.home() / ".ssh" / "config").write_text("garbage\n")
    assert parse("git@github-work:o/r").as_ssh() == "ssh://git@github-work/o/r"
    assert "Using github-work unchanged" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING


def test_without_an_alias_to_resolve_no_ssh_library_is_loaded() -> None:
    program = (
        "import sys; from pathlib import Path; from dstack_core._code.remote import Remote; "
        "Remote.parse('git@github.com:o/r', Path('/')); sys.exit('paramiko' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_what_insteadof_makes_of_an_address_stays_on_this_machine(tmp_path: Path) -> None:
    work = clone_pair(tmp_path)
    assert git(work, "remote", "get-url", "origin") == f"file://{tmp_path}/origin.git"
    assert Repository.checked(work).describe().clone == Clone(REMOTE)
    git(work, "remote", "set-url", "origin", "gh:o/r")
    git(work, "config", "url.git@github.com:.insteadOf", "gh:")
    assert Repository.checked(work).describe().clone == Clone("https://github.com/o/r")


def bundle(folder: Path, work: Path, *, mirror: bool = True) -> Path:
    """Create a checkout as Airflow's GitDagBundle does: a clone of a bare clone on this disk."""
    git(folder, "clone", "--quiet", *(["--bare"] if mirror else []), f"file://{folder}/origin.git", "mirror")
    git(folder / "mirror", "remote", "set-url", "origin", "git@git.example:o/origin.git")
    git(folder, "clone", "--quiet", str(folder / "mirror"), "bundle")
    assert git(folder / "bundle", "remote", "get-url", "origin") == str(folder / "mirror")
    return folder / "bundle"


@pytest.mark.parametrize("detached", [False, True])
def test_a_bundle_is_cloned_from_the_remote_of_its_mirror(tmp_path: Path, detached: bool) -> None:
    work = clone_pair(tmp_path)
    path = bundle(tmp_path, work)
    if detached:
        git(path, "checkout", "--quiet", "--detach")
    write(path, a="changed\n")
    code = Repository.checked(path, oauth_token=TOKEN).pack()
    assert code is not None
    assert code.clone == Clone("https://git.example/o/origin.git", oauth_token=TOKEN)
    assert code.data == {**code.info, "repo_branch": "main", "repo_hash": git(work, "rev-parse", "HEAD")}
    assert code.info["repo_name"] == "origin"
    assert code.upload is not None
    assert code.repo_id == Repository.checked(work).describe().repo_id


def test_a_clone_of_a_working_copy_is_cloned_only_where_its_commit_was_pushed(tmp_path: Path) -> None:
    work = clone_pair(tmp_path)
    path = bundle(tmp_path, work, mirror=False)
    assert Repository.checked(path).describe().clone == Clone("https://git.example/o/origin.git")
    write(tmp_path / "mirror", a="not pushed\n")
    commit(tmp_path / "mirror")
    git(path, "pull", "--quiet")
    code = Repository.checked(path).pack()
    assert code is not None
    assert code.data["repo_type"] == "local"
