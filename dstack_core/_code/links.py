"""Replacing the links that point out of a ``files`` entry by their targets.

The problem: a folder of links is an ordinary thing to name in ``files``; a Hugging Face snapshot is one. In
the container those links would be broken. But a link is also a way to make this process read, and upload, a
file that its user did not mean: a checkout has links that its repository supplies, and on a shared machine
another user may place one.

The rule: a link out of the entry is followed only if the owner of the link also owns its target, and if git
does not track the link. The entry's own path is followed unless git tracks a link in it. A link that stays
inside the entry stays a link. Anything else is refused with an error, never left out silently. The code of a
run (``repo_dir``) does not pass through here: its links stay links.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dstack_core._code.git import Git
from dstack_core._code.ignored import top_of_repository, walk
from dstack_core._code.remote import CannotCloneError
from dstack_core.errors import ConfigurationError

_LINK_MODE = "120000"
_FROM_GIT = "and comes from a Git repository, whose links are not followed"
# As Linux has it (MAXSYMLINKS): a path with more links is a loop, and fewer would refuse paths that can be
# opened.
_MOST_LINKS = 40


@dataclass(frozen=True, slots=True)
class Member:
    """One member of an archive: read from ``path``, packed as ``name``; ``link`` is a link's new target."""

    path: Path
    name: str
    link: str | None = None


@dataclass(slots=True)
class EntryLinks:
    """The members of one ``files`` entry; ``what`` names it in errors."""

    what: str
    _tracked: dict[Path, set[Path] | None] = field(default_factory=dict)

    def real_path(self, path: Path) -> Path:
        """Return the path of the entry without links.

        Raises ``ConfigurationError`` for a link that git tracks.
        """
        real = path.resolve()
        for link in _links_of(path.absolute()):
            if self._is_tracked(link):
                raise ConfigurationError(
                    f"{self.what}: could not follow the link {str(link)!r}, which points to "
                    f"{str(link.resolve())!r} {_FROM_GIT}. Name the target instead."
                )
        return real

    def members(self, root: Path, name: str, *, above: tuple[Path, ...] = ()) -> Iterator[Member]:
        """Yield the directory and its contents.

        ``above`` are the directories from which links led here. Raises ``ConfigurationError`` for a link that
        is not followed.
        """
        yield Member(root, name)
        for path in walk(root, above=not above):
            inner = f"{name}/{path.relative_to(root).as_posix()}"
            if not path.is_symlink():
                yield Member(path, inner)
                continue
            # By its text and not resolved: a chain of links that stays inside keeps all of its links.
            target = Path(os.path.normpath(path.parent / path.readlink()))
            if target.is_relative_to(root):
                yield Member(path, inner, link=os.path.relpath(target, path.parent))
                continue
            real = self._followed(path, inner, target)
            if not real.is_dir():
                yield Member(real, inner)
            # Packing it would contain itself without end.
            elif any(folder.is_relative_to(real) for folder in (root, *above)):
                raise self._refused(inner, real, "which contains the link itself")
            else:
                yield from self.members(real, inner, above=(*above, root))

    def _followed(self, path: Path, name: str, target: Path) -> Path:
        try:
            real = path.resolve(strict=True)
            is_own = path.lstat().st_uid == real.stat().st_uid
        except (OSError, RuntimeError):
            raise self._refused(name, target, "which does not exist or cannot be read") from None
        if not is_own:
            raise self._refused(name, real, "which belongs to another user than the link")
        if any(map(self._is_tracked, _links_of(path))):
            raise self._refused(name, real, _FROM_GIT)
        return real

    def _is_tracked(self, path: Path) -> bool:
        top = top_of_repository(path.parent)
        if top is None:
            return False
        if top not in self._tracked:
            self._tracked[top] = _tracked_links(top)
        tracked = self._tracked[top]
        # If git cannot list them, every link in its repository may be one of its own.
        return tracked is None or path in tracked

    def _refused(self, name: str, target: Path, why: str) -> ConfigurationError:
        return ConfigurationError(
            f"{self.what}: the link {name!r} points to {str(target)!r}, {why}. Replace it with a copy of the "
            "file, or name it in .dstackignore."
        )


def _links_of(path: Path) -> Iterator[Path]:
    """Yield each link that is followed on the way to an absolute path, in a folder without links."""
    here, rest, count = Path(path.anchor), list(reversed(path.parts[1:])), 0
    while rest and count < _MOST_LINKS:
        part = rest.pop()
        step = here.parent if part == ".." else here / part
        if not step.is_symlink():
            here = step
            continue
        yield step
        count += 1
        target = step.readlink()
        here = Path(target.anchor) if target.is_absolute() else here
        rest.extend(reversed(target.parts[1:] if target.is_absolute() else target.parts))


def _tracked_links(top: Path) -> set[Path] | None:
    """Return the links that git tracks below ``top``, None if git fails."""
    try:
        done = Git(top).run("ls-files", "--stage", "-z")
    except CannotCloneError:
        return None
    if done.returncode != 0:
        return None
    lines = [line for line in os.fsdecode(done.stdout).split("\0") if line.startswith(_LINK_MODE)]
    return {top / line.partition("\t")[2] for line in lines}
