"""The credentials with which a run clones a repository (PROTOCOL 1.3, 3.1)."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from dstack_core._attach.key_text import EncryptedKeyError
from dstack_core._attach.keys import check_private_key
from dstack_core._code.remote import Remote
from dstack_core._wire.code import Clone
from dstack_core.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class GitCredentials:
    """What a run may clone with: a private SSH key (a file or its contents), a token, or nothing."""

    identity_file: Path | None = None
    private_key: str | None = field(default=None, repr=False)
    oauth_token: str | None = field(default=None, repr=False)

    @classmethod
    def checked(
        cls,
        git_identity_file: str | os.PathLike[str] | None = None,
        oauth_token: str | None = None,
        git_private_key: str | None = None,
    ) -> GitCredentials:
        """Return the credentials with ``~`` expanded; at most one of them may be given.

        Args:
            git_identity_file: The path of a private SSH key.
            oauth_token: A token of the Git server.
            git_private_key: The text of a private SSH key.

        Raises:
            ConfigurationError: More than one is given, the file does not exist, or the text cannot be a key.
        """
        given = {
            "git_identity_file": git_identity_file,
            "git_private_key": git_private_key,
            "oauth_token": oauth_token,
        }
        names = [name for name, value in given.items() if value]
        if len(names) > 1:
            raise ConfigurationError(
                f"{' and '.join(names)}: expected one of git_identity_file, git_private_key and oauth_token, "
                f"got {len(names)}. Keep the one the Git server accepts."
            )
        identity = Path(git_identity_file).expanduser() if git_identity_file else None
        if identity is not None and not identity.is_file():
            raise ConfigurationError(
                f"git_identity_file: expected a file, got {str(identity)!r}, which does not exist."
            )
        # A path passed by mistake; the key itself is read when a run needs it. The value stays out of the
        # error.
        if git_private_key and "PRIVATE KEY-----" not in git_private_key:
            raise ConfigurationError(
                "git_private_key: expected the contents of a private key file "
                '("-----BEGIN ... PRIVATE KEY-----"), got a string that is not a key. '
                "Pass the path of a key file as git_identity_file."
            )
        return cls(identity, git_private_key or None, oauth_token or None)

    @property
    def parameter(self) -> str | None:
        """The name of the parameter that was given, None without any."""
        given = {
            "git_identity_file": self.identity_file,
            "git_private_key": self.private_key,
            "oauth_token": self.oauth_token,
        }
        return next((name for name, value in given.items() if value), None)

    def read_key(self) -> str | None:
        """Return the contents of the private key, None without one.

        Raises ``ConfigurationError`` for an encrypted key, and for anything that is not a key.
        """
        if self.identity_file is not None:
            what = f"git_identity_file: {str(self.identity_file)!r}"
            try:
                return _checked_key(what, self.identity_file.read_text())
            except (OSError, UnicodeError) as error:
                reason = (
                    error.strerror
                    if isinstance(error, OSError)
                    else "expected a private SSH key, got binary data"
                )
                raise ConfigurationError(f"{what}: {reason}.") from None
        return None if self.private_key is None else _checked_key("git_private_key", self.private_key)


def clone_of(remote: Remote, credentials: GitCredentials) -> Clone:
    """Return how the run clones: over ssh with a key, over https with a token, over https without either.

    Raises ``ConfigurationError`` for a key that cannot be used.
    """
    private_key = credentials.read_key()
    if private_key is not None:
        return Clone(remote.as_ssh(), private_key=private_key)
    return Clone(remote.as_https(), oauth_token=credentials.oauth_token)


def _checked_key(what: str, text: str) -> str:
    # Web forms and environment variables, in which hosts keep keys, change line ends and the end of the text.
    text = "\n".join(text.strip().splitlines()) + "\n"
    try:
        check_private_key(text.encode())
    except EncryptedKeyError:
        raise ConfigurationError(
            f"{what}: expected a key without a passphrase, got an encrypted one. A run cannot ask for the "
            "passphrase; use a key without one, such as a deploy key."
        ) from None
    except ValueError as error:
        raise ConfigurationError(f"{what}: {error}.") from None
    return text
