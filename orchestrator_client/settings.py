"""Which server, as whom: options, environment, and profiles in a file of the user's.

What stands on the command line counts most, then a profile that it names, then the environment,
then the file's own default profile, then the top of the file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator_client.errors import SettingsError

DEFAULT_URL = "http://localhost:5000"
_KEYS = ("url", "token", "token_file", "user", "service")
_VARIABLES = {
    "url": "ORCHESTRATOR_URL",
    "token": "ORCHESTRATOR_TOKEN",
    "token_file": "ORCHESTRATOR_TOKEN_FILE",
    "user": "ORCHESTRATOR_USER",
    "service": "ORCHESTRATOR_SERVICE",
}
_PROFILE_VARIABLE = "ORCHESTRATOR_PROFILE"
_COMMAND_LINE, _ENVIRONMENT = "the command line", "the environment"
_OTHERS_MAY_READ = stat.S_IRWXG | stat.S_IRWXO
_LONGEST_TOKEN_BYTES = 4096
_LARGEST_INTEGER = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Setting:
    """A value and where it comes from."""

    value: str
    origin: str


@dataclass(frozen=True, slots=True)
class Settings:
    """What commands need to know. ``origins`` says of each value where it comes from."""

    url: str
    token: str | None
    user_id: int
    service: str | None
    profile: str | None
    origins: Mapping[str, str]


def settings_file(environment: Mapping[str, str]) -> Path:
    """Return where the user's file is, whether or not it is there."""
    base = environment.get("XDG_CONFIG_HOME") or os.path.join(
        environment.get("HOME") or os.path.expanduser("~"), ".config"
    )
    return Path(base, "orchestrator", "config.toml")


def load(options: Mapping[str, str | None], environment: Mapping[str, str]) -> Settings:
    """Return the settings in force; ``options`` are those of the command line, by name.

    A token of the file is for the server of the same profile, and sent to no other. Raises
    :class:`SettingsError`.
    """
    file = settings_file(environment)
    content = _read(file)
    named = options.get("profile")
    profile = named or environment.get(_PROFILE_VARIABLE) or content.get("profile")
    variables = {key: environment.get(name) for key, name in _VARIABLES.items()}
    from_options = _layer(options, _COMMAND_LINE)
    from_environment = _layer(variables, _ENVIRONMENT)
    from_profile = _profile_layer(content, profile, file)
    from_file = _layer(content, str(file))
    between = [from_profile, from_environment] if named else [from_environment, from_profile]
    found = _merge([from_options, *between, from_file])
    if "token" in found or "token_file" in found:
        _keep_token_at_home(found, from_profile, from_file)
    return _checked(found, profile)


def _keep_token_at_home(
    found: dict[str, Setting], from_profile: Mapping[str, Setting], from_file: Mapping[str, Setting]
) -> None:
    """Forget a token of the file if the server is not the one that stands beside it."""
    origin = (found.get("token") or found["token_file"]).origin
    if origin in (_COMMAND_LINE, _ENVIRONMENT):
        return
    its_own = from_profile.get("url") if origin.startswith("profile") else None
    intended = its_own or from_file.get("url") or Setting(DEFAULT_URL, "")
    if found.get("url", Setting(DEFAULT_URL, "")).value != intended.value:
        found.pop("token", None)
        found.pop("token_file", None)


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text("utf-8")
        mode = file.stat().st_mode
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: {error}") from None
    import tomllib

    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{file}: {error}") from None
    _refuse_unknown(content, file)
    holders = [content, *content.get("profiles", {}).values()]
    if any("token" in holder for holder in holders) and mode & _OTHERS_MAY_READ:
        raise SettingsError(f"{file} holds a token, and others can read it: chmod 600 {file}")
    return content


def _refuse_unknown(content: Mapping[str, Any], file: Path) -> None:
    profiles = content.get("profiles", {})
    if not isinstance(profiles, dict) or not all(isinstance(p, dict) for p in profiles.values()):
        raise SettingsError(f"{file}: profiles are tables, as in [profiles.lab]")
    _refuse_unknown_keys(content, (*_KEYS, "profile", "profiles"), f"{file}: ")
    for name, table in profiles.items():
        _refuse_unknown_keys(table, _KEYS, f"{file}: profile {name}: ")


def _refuse_unknown_keys(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key, value in table.items():
        if key not in known:
            raise SettingsError(f"{where}there is no setting {key!r}; use {', '.join(_KEYS)}")
        if key != "profiles" and not isinstance(value, str | int):
            raise SettingsError(f"{where}{key} must be a text or a number")


def _profile_layer(
    content: Mapping[str, Any], profile: str | None, file: Path
) -> dict[str, Setting]:
    if profile is None:
        return {}
    profiles = content.get("profiles", {})
    if profile not in profiles:
        there = ", ".join(sorted(profiles)) or "none"
        raise SettingsError(f"there is no profile {profile!r} in {file} (there: {there})")
    return _layer(profiles[profile], f"profile {profile}")


def _layer(values: Mapping[str, Any], origin: str) -> dict[str, Setting]:
    return {
        key: Setting(str(values[key]), origin)
        for key in _KEYS
        if values.get(key) is not None and values[key] != ""
    }


def _merge(layers: list[dict[str, Setting]]) -> dict[str, Setting]:
    found: dict[str, Setting] = {}
    for layer in layers:
        # a token and a token file are two ways to say one thing
        has_token = "token" in found or "token_file" in found
        for key, setting in layer.items():
            if key in ("token", "token_file") and has_token:
                continue
            found.setdefault(key, setting)
    if "token" in found and "token_file" in found:
        raise SettingsError(f"{found['token'].origin} gives a token and a token file: use one")
    return found


def _checked(found: Mapping[str, Setting], profile: str | None) -> Settings:
    token = found["token"].value if "token" in found else None
    if "token_file" in found:
        token = read_token_file(Path(found["token_file"].value).expanduser())
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise SettingsError("the token holds a character that no token has")
    user_id = _user_id(found["user"].value) if "user" in found else os.getuid()
    return Settings(
        url=found["url"].value if "url" in found else DEFAULT_URL,
        token=token,
        user_id=user_id,
        service=found["service"].value if "service" in found else None,
        profile=profile,
        origins={key: setting.origin for key, setting in found.items()},
    )


def read_token_file(path: Path) -> str:
    """Return the token in a file that nobody else can read. Raises :class:`SettingsError`."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_mode & _OTHERS_MAY_READ:
                raise SettingsError(f"others can read the token file: chmod 600 {path}")
            content = file.read(_LONGEST_TOKEN_BYTES + 1)
    except OSError as error:
        reason = error.strerror or str(error)
        raise SettingsError(f"can't read the token file {path}: {reason}") from None
    token = content.decode("ascii", "replace").strip()
    if not token or len(content) > _LONGEST_TOKEN_BYTES:
        raise SettingsError(f"{path} holds no token")
    return token


def _user_id(text: str) -> int:
    try:
        user_id = int(text)
    except ValueError:
        raise SettingsError(f"the user id must be a number, not {text!r}") from None
    if not -_LARGEST_INTEGER - 1 <= user_id <= _LARGEST_INTEGER:
        raise SettingsError("the user id does not fit into 64 bits")
    return user_id
