"""Who is calling. API keys are compared by hash; the default key file is made on first use.

A key is 256 random bits after "sk-". Only its SHA-256 travels: in configs, Serve arguments and
memory. The tenant key, which salts the prefix cache, is derived from that hash.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from serving.config import AuthConfig
from serving.errors import ConfigError, InvalidApiKey

KEY_PREFIX = "sk-"


@dataclass(frozen=True)
class Caller:
    """One authenticated caller: an opaque tenant key, and an id fit for logs."""

    tenant_key: str
    key_id: str


class KeyRing:
    """The keys this gateway accepts."""

    def __init__(self, digests: tuple[str, ...]) -> None:
        self._digests = digests

    def authenticate(self, authorization: str | None) -> Caller:
        """The caller behind an Authorization header. Raises InvalidApiKey."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise InvalidApiKey("give an API key in the header: Authorization: Bearer sk-...")
        digest = digest_of(key.strip())
        # Every digest is compared, so that the time does not tell which one matched.
        if not any([hmac.compare_digest(digest, known) for known in self._digests]):
            raise InvalidApiKey("this API key is not known here")
        tenant = hashlib.blake2b(digest.encode(), digest_size=16, person=b"tenant").hexdigest()
        return Caller(tenant_key=tenant, key_id=digest[:8])


def digest_of(key: str) -> str:
    """What configs carry instead of a key: its SHA-256 in hex."""
    return hashlib.sha256(key.encode()).hexdigest()


def state_folder() -> Path:
    """Where Searoom keeps its key and what is running: the XDG state folder."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "searoom"


def load_key(path: Path | None = None) -> str:
    """The key of a key file (the default one if no path is given), made with mode 0600 if absent."""
    path = path or state_folder() / "api_key"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(KEY_PREFIX + secrets.token_urlsafe(32) + "\n")
        # A link fails where a file is: of two processes that start at once, both use one key.
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
        fresh.unlink()
    return _read_keys(path)[0]


def key_digests(auth: AuthConfig) -> tuple[str, ...]:
    """The digests a config stands for. Raises ConfigError for a file others can read, or an empty one."""
    if auth.key_sha256:
        return auth.key_sha256
    if auth.key_file is not None:
        return tuple(digest_of(key) for key in _read_keys(Path(auth.key_file)))
    return (digest_of(load_key()),)


def _read_keys(path: Path) -> list[str]:
    try:
        mode = path.stat().st_mode
        keys = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"{path}: the key file cannot be read: {error.strerror}") from error
    if mode & 0o077:
        raise ConfigError(f"{path}: others can read this key file; run: chmod 600 {path}")
    if not keys:
        raise ConfigError(f"{path}: the key file is empty; delete it to have a key made, or write one in it")
    return keys
