"""Diffs are applied as strictly as by dstack's runner, and with the result that git intends."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from dstack_core.local.bodies import RemoteRepoCreds
from dstack_core.local.checkout import apply_diff, check_out
from dstack_core.local.fragments import DiffError

_IDENTITY = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main")


def git(directory: Path, *arguments: str) -> bytes:
    return subprocess.run(
        ["git", *_IDENTITY, *arguments], cwd=directory, check=True, capture_output=True
    ).stdout


def tree(directory: Path) -> dict[str, tuple[bytes, bool]]:
    """Return the files of a directory without git's own: content, and whether a file is executable."""
    files = (path for path in directory.rglob("*") if path.is_file() and ".git" not in path.parts)
    return {
        str(path.relative_to(directory)): (path.read_bytes(), bool(path.stat().st_mode & 0o100))
        for path in files
    }


@pytest.fixture
def work(tmp_path: Path) -> Path:
    git(tmp_path, "init", "--quiet", "work")
    return tmp_path / "work"


def commit(work: Path) -> str:
    git(work, "add", "--all")
    git(work, "commit", "--quiet", "--allow-empty", "-m", "x")
    return git(work, "rev-parse", "HEAD").decode().strip()


def cloned(work: Path, name: str = "clone", *, branch: str | None = None, hash: str | None = None) -> Path:
    """Clone as a job does."""
    target, home = work.parent / name, work.parent / "home"
    target.mkdir()
    home.mkdir(exist_ok=True)
    data = {"repo_branch": branch, "repo_hash": hash, "repo_config_name": "me", "repo_config_email": None}
    check_out(RemoteRepoCreds(clone_url=str(work)), data, True, target, home, work.parent / "key")
    return target


def diff(work: Path, *options: str) -> bytes:
    git(work, "add", "--all")
    return git(work, "diff", "--cached", "--binary", "--full-index", *options)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("options", [(), ("--no-renames",), ("-M", "--unified=1")])
def test_any_change_of_files_arrives(work: Path, seed: int, options: tuple[str, ...]) -> None:
    chance = random.Random(seed)
    names = ["a.txt", "b b.txt", "d/é ü.txt", 'd/q"uo\\te\t.txt', "x/y/z.bin", "empty", "script.sh"]
    ends = ["\n", "\r\n", ""]

    def content() -> bytes:
        if chance.random() < 0.3:
            return chance.randbytes(chance.choice([0, 1, 52, 53, 5000]))
        lines = [f"line {chance.randrange(20)}{chance.choice(ends[:2])}" for _ in range(chance.randrange(60))]
        return (
            "".join(lines) + chance.choice(["", "no end", "\n", "\\ No newline at end of file\n"])
        ).encode()

    for name in names:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(content())
    commit(work)
    target = cloned(work)
    for name in [*names, "new/file.txt", "new.bin"]:
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or chance.random() < 0.2:
            path.write_bytes(content())
        elif chance.random() < 0.2:
            path.unlink()
        elif chance.random() < 0.2:
            path.rename(path.with_name("moved " + path.name))
        elif chance.random() < 0.6:
            lines = path.read_bytes().split(b"\n")
            for _ in range(chance.randrange(4)):
                lines[chance.randrange(len(lines))] = b"changed"
            path.write_bytes(b"\n".join(lines))
        if path.exists() and chance.random() < 0.3:
            path.chmod(0o755)
    apply_diff(diff(work, *options), target)
    assert tree(target) == tree(work)


def test_a_diff_must_fit_to_the_line_and_the_byte(work: Path) -> None:
    (work / "a").write_text("".join(f"{number}\n" for number in range(20)))
    commit(work)
    (work / "a").write_text((work / "a").read_text().replace("10\n", "ten\n"))
    change = diff(work)
    for text, error in (
        ("one more\n" + "".join(f"{number}\n" for number in range(20)), "does not match src line 8"),
        ("".join(f"{number}\r\n" for number in range(20)), "does not match src line 8"),
        ("0\n", "fewer lines"),
        (None, "No such file"),
    ):
        target = work.parent / "target"
        target.mkdir(exist_ok=True)
        (target / "a").unlink(missing_ok=True)
        if text is not None:
            (target / "a").write_bytes(text.encode())
            # Git itself accepts the first one, because it searches for the lines nearby.
        with pytest.raises(DiffError, match=error):
            apply_diff(change, target)


def test_a_clone_has_the_bytes_of_the_repository(work: Path) -> None:
    (work / ".gitattributes").write_text(
        "*.txt eol=crlf\n*.utf16 text working-tree-encoding=UTF-16LE\n*.id ident\n*.lfs filter=lfs\n"
    )
    (work / "a.txt").write_bytes(b"one\r\ntwo\r\n")
    (work / "b.utf16").write_bytes("hé\n".encode("utf-16-le"))
    (work / "c.id").write_bytes(b"$Id$\n")
    (work / "d.lfs").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    head = commit(work)
    target = cloned(work, branch="main", hash=head)
    assert (target / "a.txt").read_bytes() == b"one\ntwo\n"
    assert (target / "b.utf16").read_bytes() == "hé\n".encode()
    assert (target / "c.id").read_bytes() == b"$Id$\n"
    assert (target / "d.lfs").read_bytes().startswith(b"version https://git-lfs")
    assert not (target / ".git" / "info" / "attributes").exists()
    assert git(target, "symbolic-ref", "--short", "HEAD") == b"main\n"
    assert git(target, "config", "--local", "user.name") == b"me\n"
    older = commit(work)
    assert older
    assert (
        git(cloned(work, "detached", branch="main", hash=head), "rev-parse", "--abbrev-ref", "HEAD")
        == b"HEAD\n"
    )
    with pytest.raises(subprocess.SubprocessError, match="Remote branch nope not found"):
        cloned(work, "nowhere", branch="nope")


def test_links_in_a_diff_become_files(work: Path) -> None:
    (work / "file").write_text("text\n")
    (work / "link").symlink_to("file")
    commit(work)
    target = cloned(work)
    assert (target / "link").is_symlink()
    (work / "fresh").symlink_to("file")
    apply_diff(diff(work), target)
    fresh = target / "fresh"
    assert not fresh.is_symlink()
    assert fresh.stat().st_mode & 0o777 == 0
    commit(work)
    (work / "link").unlink()
    (work / "link").symlink_to("other")
    with pytest.raises(DiffError, match="link"):
        apply_diff(diff(work), target)


def test_a_directory_does_not_become_a_file(work: Path) -> None:
    (work / "d").mkdir()
    (work / "d" / "x").write_text("x\n")
    (work / "f").write_text("f\n")
    commit(work)
    target = cloned(work)
    (work / "f").unlink()
    (work / "f").mkdir()
    (work / "f" / "y").write_text("y\n")
    apply_diff(diff(work), target)
    assert (target / "f" / "y").read_text() == "y\n"
    commit(work)
    (work / "d" / "x").unlink()
    (work / "d").rmdir()
    (work / "d").write_text("now a file\n")
    with pytest.raises(DiffError, match="Is a directory"):
        apply_diff(diff(work), target)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("@@ -1 +1 @@\n-a\n+b\n", "without file header"),
        ("diff --git a/x b/y\n", "missing filename"),
        ("diff --git a/f b/f\n--- a/f\n+++ b/f\n@@ -1 +1 @@\n-a\n", "miscounts"),
        ("diff --git a/f b/f\n--- a/f\n+++ b/f\n@@ -1 +1 @@\n a\n", "no changes"),
        ("diff --git a/f b/f\n--- a/f\n+++ b/f\n@@ -1 +1 @@\n*a\n", "invalid line operation"),
        (
            "diff --git a/f b/f\nnew file mode 100644\n--- /dev/null\n+++ b/f\n@@ -1 +1 @@\n-a\n+b\n",
            "depends on old",
        ),
        ("diff --git a/f b/f\nindex 1..2 100644\nBinary files a/f and b/f differ\n", "does not contain"),
        ("diff --git a/f b/f\nindex 1..2 100644\nGIT binary patch\nliteral 3\nKcmZQz\n\n", "binary patch"),
        (
            "diff --git a/../x b/../x\nnew file mode 100644\n--- /dev/null\n+++ b/../x\n@@ -0,0 +1 @@\n+a\n",
            "leads out",
        ),
        ('diff --git "a/f b/f\n--- "a/f\n', "bad quotes"),
    ],
)
def test_a_malformed_diff_is_refused(tmp_path: Path, text: str, error: str) -> None:
    (tmp_path / "f").write_text("a\n")
    with pytest.raises(DiffError, match=error):
        apply_diff(text.encode(), tmp_path)
