"""Graphs over several devices, by hand: here all are CPUs, and tests/runtime/test_rpc.py takes servers."""

import pytest
from chain import LAYERS, check

from griffin_gguf.runtime.errors import BackendError, UnsupportedError
from griffin_gguf.runtime.ggml.device import Device
from griffin_gguf.runtime.ggml.graph import Context
from griffin_gguf.runtime.ggml.split import Split, open_devices, share


def test_one_device_computes_the_chain() -> None:
    check(Device(1, "CPU"))


@pytest.mark.parametrize("counts", [(4,), (1, 3), (2, 2)])
def test_a_split_computes_what_one_device_does(counts: tuple[int, ...]) -> None:
    cpu = Device(1, "CPU")
    split = Split([(cpu, n) for n in counts])
    check(split)
    assert [split.of_layer(i) for i in range(LAYERS)] == [cpu] * LAYERS
    assert split.of_head is cpu is split.of_embedding


def test_a_graph_too_large_for_memory_is_an_error() -> None:
    for device in (Device(1, "CPU"), Split([(Device(1, "CPU"), 1)])):
        context = Context(16, nodes=16)
        x = context.input((1 << 36,))
        context.output(context.add(x, x))
        with pytest.raises(BackendError, match="no memory for a graph's intermediate values"):
            device.allocator().place(context)


@pytest.mark.parametrize(
    ("wanted", "memory", "expected"),
    [
        ({"A": None}, {"A": 5}, {"A": 26}),
        ({"A": None, "B": None}, {"A": 1, "B": 1}, {"A": 13, "B": 13}),
        ({"A": None, "B": None}, {"A": 3, "B": 1}, {"A": 20, "B": 6}),
        ({"A": None, "B": None, "C": None}, {"A": 7, "B": 0, "C": 1}, {"A": 9, "B": 8, "C": 9}),
        ({"A": 4, "B": None}, {"A": 9, "B": 1}, {"A": 4, "B": 22}),
        ({"B": None, "A": 26}, {"A": 9, "B": 1}, {"B": 0, "A": 26}),
    ],
)
def test_layers_are_shared_by_memory(
    wanted: dict[str, int | None], memory: dict[str, int], expected: dict[str, int]
) -> None:
    found = share(26, wanted, memory)
    assert found == expected
    assert list(found) == list(wanted)


@pytest.mark.parametrize("wanted", [{"A": 27}, {"A": 25}, {"A": 27, "B": None}, {"A": -1, "B": None}])
def test_counts_that_do_not_come_out_are_refused(wanted: dict[str, int | None]) -> None:
    with pytest.raises(UnsupportedError, match=r"26 layers, found A="):
        share(26, wanted, {"A": 1, "B": 1})


def test_devices_are_opened_by_name() -> None:
    one = open_devices({}, LAYERS, threads=1)
    assert isinstance(one, Device)
    only = open_devices({"cpu": None}, LAYERS, threads=1)
    assert isinstance(only, Device)
    assert (only.name, only.threads) == ("CPU", 1)
    with pytest.raises(BackendError, match="no device 'Wonder'; there are CPU"):
        open_devices({"Wonder": None}, LAYERS)
    with pytest.raises(UnsupportedError, match="4 layers"):
        open_devices({"CPU": 3}, LAYERS)
