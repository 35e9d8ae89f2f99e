import json
from pathlib import Path

import pytest
from command import done, refused
from gguf import GGMLQuantizationType

from griffin_gguf.runtime.ggml.rpc import LIBRARY
from griffin_gguf.runtime.gguf_file import MATRIX_TYPES


@pytest.fixture(autouse=True)
def no_rpc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIBRARY, raising=False)


def test_the_cpu_is_listed_with_what_it_takes() -> None:
    page = done("devices")
    assert page.split()[:3] == ["device", "kind", "memory"]
    row = next(line for line in page.splitlines() if line.split()[:2] == ["CPU", "CPU"])
    assert "every type" in row
    assert "GiB" in row


def test_json_has_every_type() -> None:
    cpu = next(device for device in json.loads(done("devices", "--json")) if device["name"] == "CPU")
    assert cpu["kind"] == "CPU"
    assert cpu["maps_files"] is True
    assert {GGMLQuantizationType[name] for name in cpu["types"]} == MATRIX_TYPES
    assert set(cpu["repacked"]) <= set(cpu["types"])
    assert 0 < cpu["memory_free"] <= cpu["memory_total"]


def test_a_model_runs_on_a_device_by_name(model: Path) -> None:
    arguments = ("generate", model, "-p", "The", "-n", "4", "--temp", "0", "--threads", "1")
    assert done(*arguments, "--device", "cpu", "--layers-on", "cpu=8") == done(*arguments)


def test_what_is_not_there_is_an_error(model: Path) -> None:
    arguments = ("generate", model, "-p", "The")
    assert refused(*arguments, "--device", "Wonder") == "ggml: no device 'Wonder'; there are CPU"
    assert refused(*arguments, "--device", "CPU", "--layers-on", "CPU=7") == (
        "layers on devices: the model has 8 layers, found CPU=7"
    )
    assert "--layers-on CPU=7" in refused(*arguments, "--layers-on", "CPU=7", code=2)
    assert "NumPy has none" in refused(*arguments, "--device", "CPU", "--backend", "numpy")


def test_without_the_rpc_backend_one_is_told_how_to_get_it(model: Path, tmp_path: Path) -> None:
    page = "rpc: the installed ggml was built without its RPC backend"
    assert page in refused("devices", "--rpc", "127.0.0.1:1")
    assert page in refused("generate", model, "-p", "The", "--device", "rpc:127.0.0.1:1")
    assert page in refused("rpc-server")


def test_a_library_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(LIBRARY, str(tmp_path / "nowhere.so"))
    assert refused("rpc-server") == f"{tmp_path}/nowhere.so: no such file, though {LIBRARY} names it"
    (tmp_path / "text.so").write_text("no library")
    monkeypatch.setenv(LIBRARY, str(tmp_path / "text.so"))
    assert refused("rpc-server").startswith(f"{tmp_path}/text.so: is no RPC backend for ggml")


@pytest.mark.parametrize("endpoint", ["", ":1", "a:b", "a:1:2", "a:0", "a:65536"])
def test_an_endpoint_is_host_and_port(endpoint: str) -> None:
    assert refused("devices", "--rpc", endpoint) == f"rpc: expected HOST:PORT, found {endpoint!r}"
