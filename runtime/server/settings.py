"""What a server may be told: one table with its defaults."""

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from griffin_gguf.runtime.errors import UnsupportedError
from griffin_gguf.runtime.model import BackendName
from griffin_gguf.runtime.state import CHUNK

#: The port that Ollama's clients try first.
PORT = 11434


@dataclass(frozen=True)
class Settings:
    """All that a server may be told. Times are seconds, sizes bytes.

    Raises `UnsupportedError` for a value out of range, and for an address that others can reach without a key.
    """

    host: str = "127.0.0.1"  # the address to listen at
    port: int = PORT  # 0: one that is free
    api_key: str | None = field(default=None, repr=False)  # None: everyone who may connect may ask
    open_to_all: bool = False  # no key, though others than this machine may reach it
    allow_hosts: tuple[str, ...] = ()  # names beside loopback's that a Host header may have
    allow_origins: tuple[str, ...] = ()  # origins beside loopback's whose pages may ask; "*": all

    slots: int = 8  # answers at once, of each model; at most 512
    waiting: int = 64  # requests that may wait for a slot, of each model
    cache_nbytes: int = 256 * 2**20  # snapshots in memory, of each model; 0: no cache
    cache_folder: Path | None = None  # where snapshots that left memory are kept; None: nowhere
    cache_folder_nbytes: int = 2**30
    keep_alive: float = 300.0  # a model unused for so long is unloaded; below 0: never

    threads: int | None = None  # None: as tuned, else one a core
    backend: BackendName = "auto"
    devices: Mapping[str, int | None] = field(default_factory=dict[str, int | None])  # as `load` takes them

    max_body: int = 4 * 2**20
    max_header: int = 16 * 2**10  # request line and headers together
    connections: int = 256
    header_time: float = 10.0  # from the first byte of a request to the end of its headers
    body_time: float = 60.0  # from there to the end of its body
    idle_time: float = 60.0  # a connection without a request
    send_time: float = 60.0  # for a client that reads nothing of its answer
    grace: float = 30.0  # for running answers, once the server is to end

    log_prompts: bool = False  # texts in the log

    def __post_init__(self) -> None:
        for name, low in _LEAST.items():
            if not getattr(self, name) >= low:
                raise UnsupportedError(f"{name}: expected at least {low:g}, found {getattr(self, name)}")
        for name, most in _MOST.items():
            if getattr(self, name) > most:
                raise UnsupportedError(f"{name}: expected at most {most}, found {getattr(self, name)}")
        for name in self.allow_hosts:
            if not _NAME.fullmatch(name):
                raise UnsupportedError(f"allow_hosts: expected a name such as griffin.example.org, found {name!r}")
        for origin in self.allow_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise UnsupportedError(
                    f"allow_origins: expected * or one such as https://example.org, found {origin!r}"
                )
        self._check_key()

    def _check_key(self) -> None:
        if self.api_key is not None and not _KEY.fullmatch(self.api_key):
            raise UnsupportedError("api_key: expected printable ASCII without blanks at its ends, found something else")
        if self.api_key is None and not self.open_to_all and not is_loopback(self.host):
            raise UnsupportedError(f"host: {self.host} can be reached from elsewhere; expected an API key with it")


_NAME = re.compile(r"[A-Za-z0-9._-]+|\[?[0-9A-Fa-f:.]+\]?", re.ASCII)
_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#\s]+", re.ASCII)
_KEY = re.compile(r"[!-~]([ -~]*[!-~])?", re.ASCII)

#: Field -> its least value.
_LEAST: dict[str, float] = {
    "port": 0,
    "slots": 1,
    "waiting": 0,
    "cache_nbytes": 0,
    "cache_folder_nbytes": 0,
    "max_body": 1,
    "max_header": 1024,
    "connections": 1,
    "header_time": 0.1,
    "body_time": 0.1,
    "idle_time": 0,
    "send_time": 0.1,
    "grace": 0,
}

#: Field -> its largest value.
_MOST: dict[str, int] = {
    "port": 65535,
    "slots": CHUNK,  # a step takes so many tokens
}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address; of names only localhost is known for sure."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
