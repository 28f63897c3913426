"""Where a server is."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from orchestrator_client.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Address:
    """An address that was checked; ``prefix`` is the path before those of the API, if any."""

    host: str
    port: int
    is_secure: bool
    prefix: str

    @property
    def url(self) -> str:
        """Return it as a URL, without a slash at its end."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        scheme = "https" if self.is_secure else "http"
        usual = 443 if self.is_secure else 80
        port = "" if self.port == usual else f":{self.port}"
        return f"{scheme}://{host}{port}{self.prefix}"


def parse_address(url: str) -> Address:
    """Return the address that a URL names. Raises :class:`SettingsError`."""
    wanted = "must look like http://server:5000 or https://server"
    if any(character.isspace() or not character.isprintable() for character in url):
        raise SettingsError(f"the server's address {wanted}, without spaces")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise SettingsError(f"the server's address {url!r} {wanted}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingsError(f"the server's address {url!r} {wanted}")
    if parts.username is not None or parts.password is not None:
        raise SettingsError("the server's address must not hold a password; use a token")
    if parts.query or parts.fragment:
        raise SettingsError(f"the server's address {url!r} must end with its path")
    is_secure = parts.scheme == "https"
    default = 443 if is_secure else 80
    prefix = parts.path.rstrip("/")
    return Address(parts.hostname, port if port is not None else default, is_secure, prefix)
