"""One graph over several devices, by ggml's scheduler.

Which layer each operation belongs to, the graph says (`Context.begin`), and which device a layer lies on, `Split` does.
The scheduler cuts the graph where the device changes and copies what passes from one to the next. It writes the
addresses of those copies into the graph's nodes: a graph belongs to one scheduler for good, so each has its own, and
with it its own memory for intermediate values.
"""

import ctypes
import weakref
from collections.abc import Mapping, Sequence

from griffin_gguf.runtime.errors import BackendError, UnsupportedError
from griffin_gguf.runtime.ggml import abi, remote
from griffin_gguf.runtime.ggml.device import Device, unless_over
from griffin_gguf.runtime.ggml.graph import Context
from griffin_gguf.runtime.ggml.log import last_error

_SPARE = 64  # tensors

#: What computes nothing lies where its source lies, be it an input.
_VIEWS = (b"NONE", b"VIEW", b"RESHAPE", b"PERMUTE", b"TRANSPOSE")


class Split:
    """Several devices as one: the same methods as a `Device`'s for graphs, and which device each layer lies on.

    `devices` with the count of layers each takes, in the model's order. The CPU is added where it is not among them:
    inputs and the embedding lie there, and what another device lacks is computed there, if it writes nothing in place.
    """

    is_cpu = False

    def __init__(self, devices: Sequence[tuple[Device, int]], threads: int | None = None) -> None:
        self._layers = [device for device, count in devices for _ in range(count)]
        assert self._layers, "a split without layers"
        taking = [device for device, _ in devices]
        self._cpu = next((d for d in taking if d.is_cpu), None) or Device(threads, "CPU")
        self.devices = [*(d for d in taking if not d.is_cpu), self._cpu]  # the scheduler wants the CPU last
        self.name = ", ".join(f"{device.name} ({count} layers)" for device, count in devices)
        self.threads = self._cpu.threads
        transfers = next((d for d in self.devices if d.is_remote), self._cpu)  # knows how to reach them all
        self.lib = transfers.lib
        #: As a device's, wherever the tensors lie.
        self.write, self.read, self.read_rows, self.copy = (
            transfers.write, transfers.read, transfers.read_rows, transfers.copy
        )  # fmt: skip
        self._schedules: weakref.WeakKeyDictionary[Context, Schedule] = weakref.WeakKeyDictionary()

    def of_layer(self, layer: int) -> Device:
        """Where the weights and the state of that layer lie."""
        return self._layers[layer]

    @property
    def of_embedding(self) -> Device:
        """Where tokens become rows of the embedding."""
        return self._cpu

    @property
    def of_head(self) -> Device:
        """Where the last norm and the logits are computed: with the last layer."""
        return self._layers[-1]

    def unsupported(self, context: Context) -> str | None:
        """The first operation that writes in place and that not every device has, or None: any other one can move."""
        for device in self.devices:
            lacking = device.unsupported(context, context.in_place)
            if lacking:
                return lacking
        return None

    def allocator(self) -> "SplitAllocator":
        """What places the intermediate values of graphs."""
        return SplitAllocator(self)

    def schedule(self, context: Context) -> "Schedule":
        """The context's graph, cut and placed, once; raises `BackendError` when memory runs out."""
        found = self._schedules.get(context)
        if found is None:
            found = self._schedules[context] = Schedule(self.devices, self.lib, context, self._placed(context))
        return found

    def _placed(self, context: Context) -> dict[int, Device]:
        """Every node that computes, with its device: the layer's, or the CPU where that one lacks the operation.

        What writes in place runs where the memory is.
        """
        nodes, lib, placed = context.nodes(), abi.load(), dict[int, Device]()
        for (start, layer), stop in zip(context.begins, [b for b, _ in context.begins[1:]] + [len(nodes)], strict=True):
            device = self._cpu if layer < 0 else self._layers[min(layer, len(self._layers) - 1)]
            for node in nodes[start:stop]:
                if lib.ggml_op_desc(node) in _VIEWS:
                    continue
                if node in context.in_place:
                    placed[node] = placed.get(context.in_place[node], device)
                else:
                    placed[node] = device if device.unsupported(context, [node]) is None else self._cpu
        return placed

    def run(self, context: Context) -> None:
        """Compute the context's graph; raises `BackendError` when a device fails."""
        status = self.schedule(context).run()
        if status != abi.STATUS_SUCCESS:
            raise BackendError(f"ggml: {self.name} failed to compute a graph: status {status}{last_error()}")

    def close(self) -> None:
        """Release the devices; their buffers must be gone before."""
        for schedule in list(self._schedules.values()):
            schedule.close()
        for device in self.devices:
            device.close()


class SplitAllocator:
    """The same method as an `Allocator`'s; each graph has memory of its own."""

    def __init__(self, split: Split) -> None:
        self._split = split

    def place(self, context: Context) -> None:
        """Give every tensor of the graph its address; raises `BackendError` when memory runs out."""
        self._split.schedule(context)

    def measure(self, context: Context) -> int:
        """Bytes that the graph's values would take if one device computed it all; nothing is taken."""
        return self._split.of_head.allocator().measure(context)

    @property
    def nbytes(self) -> int:
        """None that graphs share: what was placed stays where it is."""
        return 0

    def close(self) -> None:
        """Nothing to give back: memory goes with the graphs."""


class Schedule:
    """One graph over devices, the CPU last; `placed` are its nodes with their devices."""

    _handle: int | None = None

    def __init__(
        self, devices: Sequence[Device], lib: abi.Library, context: Context, placed: Mapping[int, Device]
    ) -> None:
        self._lib, self._graph = lib, context.graph
        self._remotes = [device for device in devices if device.is_remote]
        self._released = -1
        # ggml asks for nodes and leaves; but for a few nodes, each has at most one leaf.
        count = 2 * len(context.nodes()) + _SPARE
        backends = (ctypes.c_void_p * len(devices))(*(device.backend for device in devices))
        self._handle = lib.ggml_backend_sched_new(ctypes.addressof(backends), None, len(devices), count, False, False)
        for node, device in placed.items():
            abi.load().ggml_backend_sched_set_tensor_backend(self._handle, node, device.backend)
        if not lib.ggml_backend_sched_alloc_graph(self._handle, self._graph):
            raise BackendError(f"ggml: no memory for a graph's intermediate values{last_error()}")

    @property
    def splits(self) -> int:
        """Pieces that the graph was cut into."""
        return self._lib.ggml_backend_sched_get_n_splits(self._handle)

    def run(self) -> int:
        """Compute; ggml's status."""
        return remote.call(self._run) if self._remotes else self._run()

    def _run(self) -> int:
        """With servers, on the thread of all calls to them: nothing may come between these two.

        A server forgets the graph it computed last when a buffer is given back, which ggml's client does not notice:
        it would have it computed again, and the server would hang up. Another graph in between makes it send this one.
        """
        if self._remotes and self._released != remote.Releases.count:
            for device in self._remotes:
                device.forget_graph()
            self._released = remote.Releases.count
        return abi.load().ggml_backend_sched_graph_compute(self._handle, self._graph)

    def close(self) -> None:
        """Give the memory back."""
        if self._handle:
            with unless_over():
                self._lib.ggml_backend_sched_free(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self.close()


#: What runs graphs and says where tensors lie.
Devices = Device | Split


def open_devices(devices: Mapping[str, int | None], layers: int, threads: int | None = None) -> Device | Split:
    """The devices of these names for a model of so many layers; the best one there is where none is named.

    The value is how many layers a device takes, None for its part of what is left, by its free memory. A server's
    device is never alone: inputs and the embedding stay with this machine's CPU. Raises `BackendError` for a device
    that is not to be had, `UnsupportedError` for counts that do not come to `layers`.
    """
    if not devices:
        return Device(threads)
    opened = {name: Device(threads, name) for name in devices}
    counts = share(layers, devices, {name: device.memory_free for name, device in opened.items()})
    if len(opened) == 1 and not (only := next(iter(opened.values()))).is_remote:
        return only
    return Split([(device, counts[name]) for name, device in opened.items() if counts[name] or device.is_cpu], threads)


def share(layers: int, wanted: Mapping[str, int | None], memory: Mapping[str, int]) -> dict[str, int]:
    """How many of `layers` each device takes: what it is given, else its part of the rest by `memory`, bytes.

    Every device without a number gets a part, equal parts where one does not know its memory. Raises
    `UnsupportedError` for numbers that do not come to `layers`.
    """
    given = {name: count for name, count in wanted.items() if count is not None}
    rest, open_names = layers - sum(given.values()), [name for name in wanted if name not in given]
    if min(given.values(), default=0) < 0 or rest < 0 or (rest and not open_names):
        told = ", ".join(f"{name}={count}" for name, count in given.items())
        raise UnsupportedError(f"layers on devices: the model has {layers} layers, found {told}")
    weights = [memory[name] for name in open_names]
    if not all(weights):
        weights = [1] * len(open_names)
    total, taken, result = sum(weights), 0, dict(given)
    for i, name in enumerate(open_names):  # rounded sums, so that nothing is lost between them
        stop = round(rest * sum(weights[: i + 1]) / total)
        result[name], taken = stop - taken, stop
    return {name: result[name] for name in wanted}
