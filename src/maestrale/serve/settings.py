"""What a server may be told; the command line, the environment and a TOML file all end here."""

from __future__ import annotations

from dataclasses import dataclass

from maestrale.errors import UsageError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Settings:
    """How to serve. Times are in seconds, sizes in bytes.

    name: the model's, in requests and answers. adapters: the names of its adapters, which are models too.
    api_keys: any of them opens every route; none leaves all open.
    allowed_hosts: names that a Host header may bear; empty is loopback's names on loopback, and all elsewhere.
    cors_origins: origins whose pages may call. max_queue: requests that may wait. max_unread: pieces of an answer
    that may wait for a slow reader. request_timeout: from the request's acceptance to its last token.
    header_timeout, body_timeout: for a request to arrive. write_timeout: that an answer may lie unread. max_body,
    max_header: of a request. drain: for open requests to end after SIGTERM.
    ping: silence after which a stream says that it lives. stream_interval: between two events of one stream, and
    up to five times that where many are open.
    """

    name: str
    adapters: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_queue: int = 256
    max_unread: int = 4096
    request_timeout: float = 600.0
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    write_timeout: float = 60.0
    drain: float = 30.0
    ping: float = 10.0
    stream_interval: float = 0.02
    max_body: int = 16 << 20
    max_header: int = 32 << 10
    log_json: bool = False

    def __post_init__(self) -> None:
        if self.name in self.adapters:
            raise UsageError(f"name {self.name!r} is the model's and an adapter's: give one of them another")
        if not 0 <= self.port < 1 << 16:
            raise UsageError(f"port = {self.port}: expected 0 to 65535 (0 takes a free one)")
        for name in ("max_queue", "max_unread", "max_body", "max_header"):
            if not 0 < getattr(self, name) < 1 << 40:
                raise UsageError(f"{name} = {getattr(self, name)}: expected a whole number of at least 1")
        for name in ("request_timeout", "header_timeout", "body_timeout", "write_timeout", "ping"):
            if not 0 < getattr(self, name) <= 1e6:
                raise UsageError(f"{name} = {getattr(self, name)}: expected seconds above 0, up to 1,000,000")
        for name, most in (("drain", 1e6), ("stream_interval", 10)):
            if not 0 <= getattr(self, name) <= most:
                raise UsageError(f"{name} = {getattr(self, name)}: expected seconds from 0 to {most:,.0f}")
        for key in self.api_keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise UsageError("an API key must be printable ASCII without blanks")

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names that a Host header may bear, in small letters; empty allows all."""
        loopback = LOOPBACK if self.host in LOOPBACK and not self.allowed_hosts else ()
        return tuple(name.lower() for name in self.allowed_hosts) or loopback
