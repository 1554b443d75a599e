"""Where the dstack server is and who asks: the credentials block."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from prefect.blocks.abstract import CredentialsBlock
from pydantic import ConfigDict, Field, HttpUrl, SecretStr, field_validator

if TYPE_CHECKING:
    from dstack_core import AsyncClient, Client


class DstackCredentials(CredentialsBlock):
    """Hold the address of a dstack server, a project on it and a user's token.

    A wrong value raises pydantic's ``ValidationError``. The token is a secret: Prefect stores it
    encrypted and it shows in no repr. Source: Prefect's documentation, "Blocks".

    Example:
        Load stored credentials:
        ```python
        from prefect_dstack import DstackCredentials

        credentials = DstackCredentials.load("BLOCK_NAME")
        ```
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    _block_type_name: ClassVar[str | None] = "dstack Credentials"
    _block_type_slug: ClassVar[str | None] = "dstack-credentials"
    _description: ClassVar[str | None] = "Credentials to run tasks and services on a dstack server."
    _documentation_url: ClassVar[HttpUrl | None] = HttpUrl("https://dstack.ai/docs/")
    _logo_url: ClassVar[HttpUrl | None] = HttpUrl("https://github.com/dstackai.png?size=200")

    server_url: str = Field(
        description="Address of the dstack server with its scheme, such as http://localhost:3000.",
    )
    project_name: str = Field(min_length=1, description="Name of the project on the dstack server.")
    user_token: SecretStr = Field(min_length=1, description="Token of the dstack user.")
    verify: bool | str = Field(
        default=True,
        description="Whether to check the server's TLS certificate, or the path of a CA bundle.",
    )

    @field_validator("server_url")
    @classmethod
    def _has_a_scheme(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ValueError(f"{value!r} is no address; write it with its scheme: http:// or https://")
        return value

    def get_client(
        self, *, timeout: float = 30.0, connect_timeout: float = 5.0, retry_budget: float = 30.0
    ) -> Client:
        """Return a new client, to be closed by the caller; makes no request.

        ``timeout``, ``connect_timeout`` and ``retry_budget`` in seconds, as in ``dstack_core.Client``.
        """
        from dstack_core import Client

        return Client(
            server_url=self.server_url,
            project_name=self.project_name,
            user_token=self.user_token.get_secret_value(),
            timeout=timeout,
            connect_timeout=connect_timeout,
            retry_budget=retry_budget,
            verify=self.verify,
        )

    def get_async_client(
        self, *, timeout: float = 30.0, connect_timeout: float = 5.0, retry_budget: float = 30.0
    ) -> AsyncClient:
        """Return a new async client, to be closed by the caller; makes no request.

        ``timeout``, ``connect_timeout`` and ``retry_budget`` in seconds, as in
        ``dstack_core.AsyncClient``.
        """
        from dstack_core import AsyncClient

        return AsyncClient(
            server_url=self.server_url,
            project_name=self.project_name,
            user_token=self.user_token.get_secret_value(),
            timeout=timeout,
            connect_timeout=connect_timeout,
            retry_budget=retry_budget,
            verify=self.verify,
        )
