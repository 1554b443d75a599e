"""Pack the ``files`` of a configuration, each as an archive of its own (PROTOCOL 1.3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from dstack_core._repo.archive import pack_entry
from dstack_core._repo.links import EntryLinks
from dstack_core._wire.code import Upload
from dstack_core.errors import ConfigurationError
from dstack_core.models.files import FileMapping


def pack_files(files: Iterable[FileMapping | Mapping[str, str] | str]) -> list[tuple[str, Upload]]:
    """Return each entry's path in the container with its archive.

    Local paths are relative to the current directory. Raises ``ConfigurationError`` for a path that is
    not there, cannot be read, or leads through a link that git tracks.
    """
    mappings = [FileMapping.model_validate(file) for file in files]
    return [(mapping.path, _archive(mapping)) for mapping in mappings]


def _archive(mapping: FileMapping) -> Upload:
    what = f"files: {mapping.local_path!r}"
    named = Path(mapping.local_path).expanduser()
    try:
        path = EntryLinks(what).real_path(named)
        if not path.exists() or not path.name:
            raise ConfigurationError(f"{what}: expected a file or directory, got none at {path}.")
        return pack_entry(what, path)
    except OSError as error:
        raise ConfigurationError(f"{what}: {error.filename or named}: {error.strerror}.") from None
