"""The files of a directory without those that its ignore files name.

``.gitignore`` and ``.dstackignore`` have git's own syntax and precedence: the deepest file that names a path
decides, and what lies below an ignored directory is never visited. Ignore files above the directory count
too, up to the top of its Git repository (``__pycache__/`` is written once, at the top). But a directory that
a caller names is wanted: rules above it that cover all of it (``data/``, ``data/*``, ``*``) are dropped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

_GIT_FILE = ".gitignore"
_OWN_FILE = ".dstackignore"
# A name that no file has and no rule names: only a rule for everything in a directory matches it.
_ANY_NAME = "\x01"


@dataclass(frozen=True, slots=True)
class _RuleFile:
    folder: Path
    name: str
    spec: GitIgnoreSpec

    def verdict(self, path: Path, is_dir: bool) -> bool | None:
        """Return whether the path is ignored, None if no rule names it."""
        name = path.relative_to(self.folder).as_posix() + ("/" if is_dir else "")
        return self.spec.check_file(name).include

    def below(self, root: Path) -> _RuleFile:
        """Return the rules without those that cover all of ``root``."""
        name = root.relative_to(self.folder).as_posix()
        kept = [
            pattern
            for pattern in self.spec.patterns
            if not pattern.include
            or not any(pattern.match_file(f"{name}/{rest}") for rest in ("", _ANY_NAME))
        ]
        return _RuleFile(self.folder, self.name, type(self.spec)(kept))


def walk(root: Path, tracked: Collection[Path] = (), *, above: bool = True) -> Iterator[Path]:
    """Yield the files and links below ``root``, sorted; ``.git`` is left out.

    ``tracked`` are the files that git tracks and the directories they lie in: git does not apply
    ``.gitignore`` to those. Without ``above`` only ignore files in the directory count. Raises ``OSError``.
    """
    return _walk(root, _rules_above(root) if above else [], tracked)


def _walk(folder: Path, rules: list[_RuleFile], tracked: Collection[Path]) -> Iterator[Path]:
    rules = rules + _rules_of(folder)
    for path in sorted(folder.iterdir()):
        # A link to a directory is a link: walking into it could leave the directory, or never end.
        is_dir = path.is_dir() and not path.is_symlink()
        if path.name == ".git" or _is_ignored(path, is_dir, rules, path in tracked):
            continue
        if is_dir:
            yield from _walk(path, rules, tracked)
        # Not sockets, pipes and devices: reading them would block, and they mean nothing elsewhere.
        elif path.is_file() or path.is_symlink():
            yield path


def _rules_above(root: Path) -> list[_RuleFile]:
    """Return the rules of the directories between the top of a Git repository and ``root``."""
    top = top_of_repository(root)
    if top is None:
        return []
    above = [folder for folder in root.parents if folder.is_relative_to(top)]
    return [rules.below(root) for folder in reversed(above) for rules in _rules_of(folder)]


def top_of_repository(path: Path) -> Path | None:
    """Return the nearest directory at or above ``path`` that has a ``.git``, None without one."""
    return next((folder for folder in (path, *path.parents) if (folder / ".git").exists()), None)


def _rules_of(folder: Path) -> list[_RuleFile]:
    # Only a client that packs a directory pays for the import.
    from pathspec import GitIgnoreSpec

    files = [folder / name for name in (_GIT_FILE, _OWN_FILE)]
    return [
        _RuleFile(folder, path.name, GitIgnoreSpec.from_lines(path.read_text(errors="replace").splitlines()))
        for path in files
        if path.is_file()
    ]


def _is_ignored(path: Path, is_dir: bool, rules: list[_RuleFile], is_tracked: bool) -> bool:
    # The deepest file first, and in a folder .dstackignore before .gitignore.
    for rule_file in reversed(rules):
        if is_tracked and rule_file.name == _GIT_FILE:
            continue
        verdict = rule_file.verdict(path, is_dir)
        if verdict is not None:
            return verdict
    return False
