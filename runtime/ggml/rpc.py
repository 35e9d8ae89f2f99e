"""Devices of other processes and machines, by ggml's RPC backend, and serving this machine's own.

llama-cpp-python's wheels are built without that backend; docs/distributed.md says how to come by it. It is found where
ggml itself was built with it, else by the environment variable GRIFFIN_RPC_LIBRARY. The protocol has no passwords
and no encryption: whoever reaches a server's port can make it compute and read its memory.
"""

import ctypes
import functools
import os
import socket
from pathlib import Path

from griffin_gguf.runtime.errors import BackendError, UnsupportedError
from griffin_gguf.runtime.ggml import abi
from griffin_gguf.runtime.ggml.log import capture, last_error
from griffin_gguf.runtime.ggml.remote import call

#: The environment variable that names the shared library of ggml's RPC backend.
LIBRARY = "GRIFFIN_RPC_LIBRARY"

#: Where a server listens unless told otherwise.
PORT = 50052

_PATIENCE = 5.0  # seconds for a server to say hello
_HELLO, _CAPABILITIES = 14, 24  # the command's number, its operand's bytes
_PROTOCOL = 7  # RPC_PROTO_MAJOR_VERSION of the declared ggml


@functools.cache
def _registry() -> int:
    """The registry of the RPC backend, loaded at need; raises `BackendError` where it is not to be found."""
    lib = abi.load()
    capture(lib)
    found: int | None = lib.ggml_backend_reg_by_name(b"RPC")
    if found:
        return found
    path = os.environ.get(LIBRARY)
    if not path:
        raise BackendError(
            f"rpc: the installed ggml was built without its RPC backend, and {LIBRARY} names no library of it "
            "(docs/distributed.md says how to build one)"
        )
    if not Path(path).is_file():
        raise BackendError(f"{path}: no such file, though {LIBRARY} names it")
    found = lib.ggml_backend_load(path.encode())
    if not found or lib.ggml_backend_reg_name(found) != b"RPC":
        raise BackendError(f"{path}: is no RPC backend for ggml {abi.GGML_VERSION}{last_error()}")
    return found


def parse(endpoint: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT" or "HOST"; raises `UnsupportedError`."""
    host, _, port = endpoint.partition(":")
    if not host or not (port or str(PORT)).isdecimal() or not 0 < int(port or PORT) < 65536:
        raise UnsupportedError(f"rpc: expected HOST:PORT, found {endpoint!r}")
    return host, int(port or PORT)


@functools.cache
def connect(endpoint: str) -> list[str]:
    """Make the devices of the server at `endpoint` ("HOST:PORT") known to ggml; their names, "RPC0" and so on.

    Raises `BackendError` where nothing answers, or something else than such a server of this ggml.
    """
    host, port = parse(endpoint)
    add_server = _function("ggml_backend_rpc_add_server")
    _greet(host, port)
    lib = abi.load()
    registry = call(abi.RPC_ADD_SERVER(add_server), f"{host}:{port}".encode())
    if not registry:
        raise BackendError(f"rpc: the server at {host}:{port} has no devices")
    lib.ggml_backend_register(registry)
    devices = [lib.ggml_backend_reg_dev_get(registry, i) for i in range(lib.ggml_backend_reg_dev_count(registry))]
    return [lib.ggml_backend_dev_name(device).decode() for device in devices]


def _function(name: str) -> int:
    address: int | None = abi.load().ggml_backend_reg_get_proc_address(_registry(), name.encode())
    if not address:
        raise BackendError(f"rpc: the RPC backend has no function {name}")
    return address


def _greet(host: str, port: int) -> None:
    """Say hello and hang up: where this raises, ggml's own client would end the process or wait for ever."""
    where = f"rpc: the server at {host}:{port}"
    try:
        with socket.create_connection((host, port), timeout=_PATIENCE) as connection:
            connection.sendall(bytes([_HELLO]) + _CAPABILITIES.to_bytes(8, "little") + bytes(_CAPABILITIES))
            answer = b""
            while len(answer) < 11:  # the answer's size (8 bytes), then major, minor, patch
                piece = connection.recv(64)
                if not piece:
                    raise BackendError(f"{where} does not speak ggml's RPC protocol, version {_PROTOCOL}")
                answer += piece
    except TimeoutError:
        raise BackendError(f"{where} does not answer: it is out of reach, or serves someone else") from None
    except OSError as error:
        raise BackendError(f"{where} cannot be reached: {error.strerror or error}") from None
    size, (major, minor, patch) = int.from_bytes(answer[:8], "little"), answer[8:11]
    if size != 4 + _CAPABILITIES or major != _PROTOCOL:
        raise BackendError(
            f"{where} speaks version {major}.{minor}.{patch} of ggml's RPC protocol, expected {_PROTOCOL}; "
            "the same griffin-gguf must run on both sides"
        )


def serve(endpoint: str, device: int, threads: int) -> None:
    """Let others compute on `device` (a `ggml_backend_dev_t`), one client at a time; returns only by an error.

    ggml writes to stdout who comes and goes. Raises `BackendError` where the address cannot be had. ggml's cache of
    weights stays off: it takes a file that was half written for a whole one.
    """
    host, port = parse(endpoint)
    start = abi.RPC_START_SERVER(_function("ggml_backend_rpc_start_server"))
    try:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, port))
            address = trial.getsockname()[0]  # ggml takes no names here
    except OSError as error:
        raise BackendError(f"rpc: cannot listen at {host}:{port}: {error.strerror or error}") from None
    start(f"{address}:{port}".encode(), None, threads, 1, (ctypes.c_void_p * 1)(device))
    raise BackendError(f"rpc: cannot serve at {host}:{port}{last_error()}")
