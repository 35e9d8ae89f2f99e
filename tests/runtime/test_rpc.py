"""Devices of other processes, for real: ggml's RPC backend is compiled, servers run on loopback.

A process that has lost a server cannot use another one, and ggml's list of devices only grows: so what is done here is
done in processes of its own, each a function below that runs by its name.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Server, rpc_library, rpc_server

from griffin_gguf.runtime.ggml.rpc import LIBRARY

pytestmark = pytest.mark.slow
_SUPPORT = Path(__file__).resolve().parents[1] / "support"


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LIBRARY, str(rpc_library(tmp_path_factory.mktemp("rpc"))))
        yield


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    with rpc_server() as one, rpc_server() as two:
        yield [one, two]


def run(script: str, *arguments: str) -> str:
    """What a Python script prints; it must end by itself, and well."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_SUPPORT), *sys.path])}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout


CHAIN = """
import sys
from chain import check
from griffin_gguf.runtime.ggml.device import Device
from griffin_gguf.runtime.ggml.split import Split
one, two = (Device(1, f"rpc:{endpoint}") for endpoint in sys.argv[1:])
assert not one.is_cpu and one.name != two.name
check(one)
check(Split([(one, 4)], threads=1))
check(Split([(one, 2), (two, 2)], threads=1))
check(Split([(one, 1), (Device(1, "CPU"), 1), (two, 2)]))
print("right")
"""


def test_layers_lie_on_servers(servers: list[Server]) -> None:
    assert run(CHAIN, *(s.endpoint for s in servers)) == "right\n"


BUFFERS_COME_AND_GO = """
import sys
from chain import Chain
from griffin_gguf.runtime.ggml.device import Device
from griffin_gguf.runtime.ggml.graph import Context
from griffin_gguf.runtime.ggml.split import Split
device = Device(1, f"rpc:{sys.argv[1]}")
split = Split([(device, 4)], threads=1)
chain = Chain(split)
context, given, result = chain.graph()
split.allocator().place(context)
for _ in range(3):
    split.run(context)
    split.read(result)
    other = Context(1)
    other.new((256,))
    device.allocate(other, "a test").close()
print("right")
"""


def test_a_graph_can_be_replayed_after_a_buffer_was_given_back(servers: list[Server]) -> None:
    """ggml's server forgets its graph then, and its client does not know: see split.py."""
    assert run(BUFFERS_COME_AND_GO, servers[0].endpoint) == "right\n"


LOST = """
import os, signal, sys
from chain import Chain, check
from griffin_gguf.runtime.errors import BackendError
from griffin_gguf.runtime.ggml.device import Device
from griffin_gguf.runtime.ggml.split import Split
one = Device(1, f"rpc:{sys.argv[1]}")
devices = [one, Split([(one, 2), (Device(1, "CPU"), 2)])]
device = devices[int(sys.argv[3])]
chain = check(device)
os.kill(int(sys.argv[2]), signal.SIGKILL)
context, given, result = chain.graph()
for _ in range(3):
    try:
        device.allocator().place(context)
        device.run(context)
        device.read(result)
    except BackendError as error:
        print(error)
check(Device(1, "CPU"))
chain = device = devices = one = None
print("going on")
"""


@pytest.mark.parametrize("split", [0, 1])
def test_a_server_that_goes_away_is_an_error_and_the_process_goes_on(servers: list[Server], split: int) -> None:
    lines = run(LOST, servers[0].endpoint, str(servers[0].process.pid), str(split)).splitlines()
    assert len(lines) == 4
    assert all(line.startswith("rpc: the connection to a server is lost") for line in lines[:3])
    assert lines[3] == "going on"


ASSERTION = """
import ctypes, sys
from griffin_gguf.runtime.ggml import abi
from griffin_gguf.runtime.ggml.device import Device
device = Device(1, f"rpc:{sys.argv[1]}")
device.lib.ggml_backend_tensor_get(None, None, 0, 0)
"""


def test_a_failed_assertion_still_ends_the_process(servers: list[Server]) -> None:
    """Only what is about a connection becomes an error: after any other abort nothing can be trusted."""
    with pytest.raises(AssertionError, match="ggml-backend.cpp.*GGML_ASSERT"):
        run(ASSERTION, servers[0].endpoint)


TOO_MUCH = """
import sys
from griffin_gguf.runtime.errors import BackendError
from griffin_gguf.runtime.ggml.device import Device
from griffin_gguf.runtime.ggml.graph import Context
device = Device(1, f"rpc:{sys.argv[1]}")
context = Context(1)
context.new((1 << 31, 1 << 12))
try:
    device.allocate(context, "a test")
except BackendError as error:
    print(error)
"""


def test_memory_that_a_server_does_not_have_is_an_error(servers: list[Server]) -> None:
    assert run(TOO_MUCH, servers[0].endpoint).startswith("ggml: no memory for a test")


BUSY = """
import sys
from griffin_gguf.runtime.errors import BackendError
from griffin_gguf.runtime.ggml import rpc
rpc._PATIENCE = 0.5
try:
    rpc.connect(sys.argv[1])
except BackendError as error:
    print(error)
"""

HOLD = """
import sys, time
from griffin_gguf.runtime.ggml.device import Device
device = Device(1, f"rpc:{sys.argv[1]}")
print("held", flush=True)
time.sleep(60)
"""


def test_a_server_that_serves_someone_else_is_said_to(servers: list[Server]) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, servers[0].endpoint], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        assert "serves someone else" in run(BUSY, servers[0].endpoint)
    finally:
        holder.kill()
        holder.wait()
