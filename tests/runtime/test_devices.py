"""Devices by name and what each can take; and what happens when memory is not to be had."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from griffin_gguf.convert.pipeline import convert
from griffin_gguf.runtime import load
from griffin_gguf.runtime.backends.ggml import GgmlBackend
from griffin_gguf.runtime.errors import BackendError, UnsupportedError
from griffin_gguf.runtime.ggml import remote, rpc
from griffin_gguf.runtime.ggml.catalog import catalog, extra_buffer_types, find, library, names
from griffin_gguf.runtime.ggml.device import Allocator, Device
from griffin_gguf.runtime.ggml.graph import Context
from griffin_gguf.runtime.ggml.remote import RemoteLibrary
from griffin_gguf.runtime.gguf_file import MATRIX_TYPES

_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("model") / "demo.gguf"
    convert(_ROOT / "cli" / "demo_model", [(target, "Q8_0")])
    return target


def test_every_device_is_found_by_its_name_in_either_case() -> None:
    assert "CPU" in names()
    assert [find(name.lower()) for name in names()] == [find(name) for name in names()]
    device = Device(1, "cpu")
    assert (device.name, device.is_cpu, device.is_remote, device.threads) == ("CPU", True, False, 1)
    assert not isinstance(library(find("CPU")), RemoteLibrary)


def test_an_unknown_device_is_refused_with_those_there_are() -> None:
    with pytest.raises(BackendError, match=r"^ggml: no device 'CUDA7'; there are .*CPU"):
        Device(1, "CUDA7")


def test_the_catalog_says_what_the_cpu_takes() -> None:
    cpu = next(info for info in catalog() if info.name == "CPU")
    assert (cpu.kind, cpu.maps_files) == ("CPU", True)
    assert set(cpu.types) == {t.name for t in MATRIX_TYPES}
    assert set(cpu.repacked) < set(cpu.types)
    assert 0 < cpu.memory_free <= cpu.memory_total
    assert len(extra_buffer_types(find("CPU"))) == len(set(extra_buffer_types(find("CPU"))))


def test_numpy_takes_no_devices(model: Path) -> None:
    with pytest.raises(UnsupportedError, match="expected ggml"):
        load(model, "numpy", devices={"CPU": None})


def test_a_device_that_was_asked_for_is_never_replaced_in_silence(model: Path) -> None:
    with pytest.raises(BackendError, match="no device 'Nowhere'"):
        load(model, "auto", devices={"Nowhere": None})


def test_an_endpoint() -> None:
    assert rpc.parse("10.0.0.2:50052") == ("10.0.0.2", 50052)
    assert rpc.parse("example.org") == ("example.org", rpc.PORT)
    for text in ("", ":5", "a:b", "a:1:2", "a:0", "a:65536", "a:-1"):
        with pytest.raises(UnsupportedError, match="expected HOST:PORT"):
            rpc.parse(text)


def test_a_buffer_larger_than_any_memory_is_an_error() -> None:
    context = Context(1)
    context.new((1 << 31, 1 << 12))
    with pytest.raises(BackendError, match="no memory for a test"):
        Device(1, "CPU").allocate(context, "a test")


#: Bounds what the process may allocate, once a model runs; then asks for more than that, and for what is there.
BOUNDED = """
import resource, sys
import numpy as np
from griffin_gguf.runtime import load
from griffin_gguf.runtime.backends.ggml import GgmlBackend
from griffin_gguf.runtime.errors import BackendError

def expect(what, ask):
    try:
        ask()
    except BackendError as error:
        assert what in str(error), error
        return
    raise AssertionError(what)

with load(sys.argv[1], "ggml", threads=1, devices={"CPU": None}) as model:
    state = model.new_state()
    model.forward([1, 2, 3], state)
    first = model.forward([4], state)
    taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (4 << 20), -1))
    states = []
    expect("states of", lambda: [states.append(model.new_state()) for _ in range(1000)])
    hoard = []
    while True:
        try:
            hoard.append(np.empty(4 << 20, np.uint8))
        except MemoryError:
            break
    expect("no memory for a graph", lambda: model.forward(range(3, 503), state, every=True))  # over 5 MB
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    again = states[-1] if states else model.new_state()
    model.forward([1, 2, 3], again)
    assert np.array_equal(model.forward([4], again), first)
    model.forward(range(3, 503), again)
print("right")
"""


def test_memory_that_cannot_be_had_is_an_error_and_the_model_goes_on(model: Path) -> None:
    if sys.platform != "linux":  # elsewhere a process cannot bound its own memory like this
        return
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", BOUNDED, str(model)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


def test_a_graph_that_could_not_be_placed_leaves_no_graph_behind(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ggml frees an allocator's memory before it asks for more: the graphs kept there must be built anew."""
    place = Allocator.place
    huge = Context(8, nodes=8)
    x = huge.input((1 << 36,))
    huge.output(huge.add(x, x))

    with load(model, "ggml", threads=1, devices={"CPU": None}) as loaded:
        state, other = loaded.new_state(), loaded.new_state()
        for text in ([5], [6]):
            loaded.forward(text, state)
            loaded.forward(text, other)
        expected = loaded.forward([6], state)
        with monkeypatch.context() as patch:
            patch.setattr(Allocator, "place", lambda self, _: place(self, huge))
            with pytest.raises(BackendError, match="no memory for a graph's intermediate values"):
                loaded.forward([7, 8, 9], state)
        assert np.array_equal(loaded.forward([6], other), expected)
        backend = loaded._backend
        assert isinstance(backend, GgmlBackend)
        assert backend.allocators[False].nbytes > 0  # nothing was computed in memory that is gone


@contextmanager
def answering(answer: bytes | None) -> Iterator[int]:
    """A server on loopback that says this to everyone, whatever is asked; None: that never says a thing. Its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        if answer is None:
                            connection.recv(1 << 10)
                            connection.recv(1 << 10)  # until the other side hangs up
                        connection.sendall(answer or b"")
                        connection.recv(1 << 10)

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"", "does not speak ggml's RPC protocol"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "speaks version .* of ggml's RPC protocol, expected 7"),
        ((28).to_bytes(8, "little") + bytes([6, 3, 1]) + bytes(25), "speaks version 6.3.1 of ggml's RPC protocol"),
        (None, "does not answer: it is out of reach, or serves someone else"),
    ],
)
def test_what_is_no_server_of_ours_is_said_to_be(
    answer: bytes | None, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "_PATIENCE", 0.2 if answer is None else 5.0)
    with answering(answer) as port, pytest.raises(BackendError, match=problem):
        rpc._greet("127.0.0.1", port)


def test_a_server_of_ours_is_greeted_and_none_at_all_is_named() -> None:
    with answering((28).to_bytes(8, "little") + bytes([7, 0, 0]) + bytes(25)) as port:
        rpc._greet("127.0.0.1", port)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(BackendError, match=rf"^rpc: the server at 127\.0\.0\.1:{port} cannot be reached: "):
        rpc._greet("127.0.0.1", port)
    with pytest.raises(BackendError, match=r"no-such-host\.invalid:50052 cannot be reached"):
        rpc._greet("no-such-host.invalid", 50052)


def test_calls_that_may_reach_a_server_run_on_one_thread_and_give_back_what_comes() -> None:
    here = threading.current_thread()
    there = remote.call(threading.current_thread)
    assert there is not here
    assert remote.call(threading.current_thread) is there
    assert remote.call(lambda: remote.call(threading.current_thread)) is there  # such as a destructor, in a call
    assert remote.call(divmod, 17, 5) == (3, 2)
    with pytest.raises(ZeroDivisionError):
        remote.call(divmod, 1, 0)
    assert remote.call(divmod, 17, 5) == (3, 2)
    found: list[int] = []
    threads = [threading.Thread(target=lambda i=i: found.append(remote.call(abs, -i))) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(20))
    assert not remote.is_over()
