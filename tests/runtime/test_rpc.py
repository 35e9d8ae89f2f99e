"""Devices of other processes, for real: ggml's RPC backend is compiled, servers run on loopback.

A process that has lost a server cannot use another one, and ggml's list of devices only grows: so what is done here is
done in processes of its own, each a function below that runs by its name.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Server, rpc_library, rpc_server

from griffin_gguf.convert.pipeline import convert
from griffin_gguf.runtime.ggml.rpc import LIBRARY

pytestmark = pytest.mark.slow
_ROOT = Path(__file__).resolve().parents[2]
_SUPPORT = _ROOT / "tests" / "support"


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LIBRARY, str(rpc_library(tmp_path_factory.mktemp("rpc"))))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("model") / "demo.gguf"
    convert(_ROOT / "cli" / "demo_model", [(target, "Q4_K_M")])
    return target


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
from chain import Chain, check
from griffin_gguf.runtime.ggml import abi
from griffin_gguf.runtime.ggml.device import Device
from griffin_gguf.runtime.ggml.split import Split
one, two = (Device(1, f"rpc:{endpoint}") for endpoint in sys.argv[1:])
assert not one.is_cpu and one.name != two.name
check(one)
check(Split([(one, 4)], threads=1))
check(Split([(one, 2), (two, 2)], threads=1))
check(Split([(one, 1), (Device(1, "CPU"), 1), (two, 2)]))

def lacking(*names):  # as if the device lacked these
    def unsupported(context, nodes=None):
        ops = (abi.load().ggml_op_desc(node).decode() for node in (context.nodes() if nodes is None else nodes))
        return next((op for op in ops if op in names), None)
    return unsupported

one.unsupported = lacking("TANH", "MUL")  # those are computed here
check(Split([(one, 2), (two, 2)], threads=1))
one.unsupported = lacking("CPY")  # but none that writes into the server's memory
assert Split([(one, 4)]).unsupported(Chain(Split([(one, 4)])).graph()[0]) == "CPY"
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
    with pytest.raises(AssertionError, match=r"ggml-backend.cpp.*GGML_ASSERT"):
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


#: All that a model does, on one device and on those of the arguments: chunks, single tokens, copies, batches, rollback.
MODEL = """
import sys
import numpy as np
from griffin_gguf.runtime import load

def answers(model, folder):
    text = np.random.default_rng(0).integers(3, 300, 600)
    state = model.new_state()
    found = [model.forward(text, state)]
    for _ in range(8):
        found.append(model.forward([int(found[-1].argmax())], state))
    copy = state.copy()
    found.append(model.forward([7, 8, 9], state, every=True, trace=True)[0])
    state.rollback(state.position - 2)
    found += list(model.forward([8, 9], state, every=True))
    copy.save(folder + "/state")
    kept = model.load_state(folder + "/state")
    more = [model.new_state() for _ in range(5)]  # the pool of states grows
    found += model.forward_batch([([5], state), ([6, 7, 8], copy), ([9] * 5, more[0]), ([5], kept)])
    return found

path, folder, *names = sys.argv[1:]
devices = {name: int(count) if count else None for name, _, count in (text.partition("=") for text in names)}
with load(path, "ggml", threads=1) as model:
    expected = answers(model, folder)
with load(path, "ggml", threads=1, devices=devices) as model:
    found = answers(model, folder)
    assert not model._backend.device.is_cpu
scale = max(float(abs(x).max()) for x in expected)
worst = max(float(abs(x - y).max()) for x, y in zip(expected, found, strict=True))
assert worst <= 1e-5 * scale, worst / scale
assert all(x.argmax() == y.argmax() for x, y in zip(expected, found, strict=True))
print("right")
"""


@pytest.mark.parametrize(
    "devices", [("{0}",), ("{0}", "{1}"), ("CPU=2", "{0}=1", "{1}=5"), ("{0}=3", "CPU=5")], ids=" ".join
)
def test_a_model_over_servers_says_what_it_says_on_one(
    servers: list[Server], model: Path, tmp_path: Path, devices: tuple[str, ...]
) -> None:
    names = [text.format(*(f"rpc:{server.endpoint}" for server in servers)) for text in devices]
    assert run(MODEL, str(model), str(tmp_path), *names) == "right\n"


LOST_IN_GENERATION = """
import os, signal, sys
from griffin_gguf.runtime import load
from griffin_gguf.runtime.errors import BackendError
path, pid, *names = sys.argv[1:]
with load(path, "ggml", threads=1) as other, load(path, "ggml", threads=1, devices=dict.fromkeys(names)) as model:
    state = model.new_state()
    model.forward([1, 2, 3], state)
    os.kill(int(pid), signal.SIGKILL)
    for attempt in (lambda: model.forward([4], state), lambda: model.forward([4], model.new_state())):
        try:
            attempt()
        except BackendError as error:
            print(str(error).partition(" (")[0])
    del state
    other.forward([1, 2, 3], other.new_state())
print("going on")
"""


def test_a_server_that_dies_in_a_generation(servers: list[Server], model: Path) -> None:
    names = [f"rpc:{server.endpoint}" for server in servers]
    lines = run(LOST_IN_GENERATION, str(model), str(servers[1].process.pid), *names).splitlines()
    assert lines[:1] == ["rpc: the connection to a server is lost"]
    assert set(lines[:-1]) == {"rpc: the connection to a server is lost"}
    assert lines[-1] == "going on"


def test_the_command_runs_a_model_on_servers_and_lists_them(servers: list[Server], model: Path) -> None:
    names = ",".join(f"rpc:{server.endpoint}" for server in servers)
    command = [sys.executable, "-m", "griffin_gguf.cli"]
    listed = subprocess.run([*command, "devices", "--rpc", servers[0].endpoint], capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    assert f"RPC0: {servers[0].endpoint}" in listed.stdout
    given = ["generate", str(model), "-p", "Once upon", "-n", "12", "--temp", "0", "--threads", "1"]
    here = subprocess.run([*command, *given], capture_output=True, text=True)
    there = subprocess.run([*command, *given, "--device", names], capture_output=True, text=True)
    assert (here.returncode, there.returncode) == (0, 0), there.stderr
    assert here.stdout == there.stdout != ""


def test_ctrl_c_ends_a_server(servers: list[Server]) -> None:
    servers[0].process.send_signal(signal.SIGINT)
    assert servers[0].process.wait(10) == 130
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(servers[0].endpoint.rpartition(":")[2])))


def test_an_address_in_use_is_refused(servers: list[Server]) -> None:
    port = servers[0].endpoint.rpartition(":")[2]
    command = [sys.executable, "-m", "griffin_gguf.cli", "rpc-server", "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr == f"griffin: error: rpc: cannot listen at 127.0.0.1:{port}: Address already in use\n"


def test_the_command_says_in_one_line_that_a_server_died(servers: list[Server], model: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "griffin_gguf.cli",
        "generate",
        str(model),
        "-p",
        "Once",
        "-n",
        "100000",
        "--temp",
        "0",
    ]
    devices = ["--threads", "1", "--device", f"rpc:{servers[0].endpoint}"]
    with subprocess.Popen([*command, *devices], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.read(20)  # the answer has begun
        servers[0].process.kill()
        process.stdout.read()
        complaint = process.stderr.read().decode()
        assert process.wait(30) == 1
    assert complaint.startswith("griffin: error: rpc: the connection to a server is lost")
    assert complaint.count("\n") == 1
