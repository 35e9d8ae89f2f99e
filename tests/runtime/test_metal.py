"""Every operation of our graphs is one that Metal computes: no Mac is needed to know (see support/metal.py)."""

from dataclasses import replace
from typing import Literal

import pytest
from gguf import GGMLQuantizationType as T
from griffins import NINE_B, TWO_B
from metal import SOURCE, TABLE, Node, computes, node

from griffin_gguf.quant.file_types import ALWAYS_F32, FILE_TYPES
from griffin_gguf.quant.recipes import plan as planned
from griffin_gguf.runtime.arch import Hyperparameters
from griffin_gguf.runtime.backends.ggml_memory import Pool
from griffin_gguf.runtime.backends.ggml_ops import GgmlOps, Part, Plan
from griffin_gguf.runtime.ggml import abi
from griffin_gguf.runtime.ggml.device import Device
from griffin_gguf.runtime.ggml.graph import Context, Tensor
from griffin_gguf.runtime.gguf_file import MATRIX_TYPES
from griffin_gguf.runtime.griffin import forward
from griffin_gguf.runtime.state import kv_type

#: The published shapes with one layer of each kind and one more, since all others are like them; and the demo model's.
SHAPES = {
    "2b": replace(TWO_B, layers=3, recurrent=(True, False, True)),
    "9b": replace(NINE_B, layers=3, recurrent=(True, False, True)),
    "demo": replace(
        TWO_B, layers=8, hidden=256, mlp_width=1024, vocab=2560, heads=2, head_width=128, rope_width=64, lru_width=512,
        gate_blocks=2, window=256, recurrent=tuple(i % 3 != 2 for i in range(8)),
    ),
}  # fmt: skip
RING = 768  # rows: the demo model's whole ring

_SINGLE = Part(0, 1, False, RING)
PLANS = {
    "token": Plan((_SINGLE,), "last", False),
    "first token": Plan((Part(0, 1, True, 256),), "last", False),
    "chunk": Plan((Part(0, 512, True, 512),), "last", False),
    "odd chunk": Plan((Part(0, 77, False, RING),), "every", False),
    "silent chunk": Plan((Part(0, 512, False, RING),), "none", False),
    "traced chunk": Plan((Part(0, 9, False, RING),), "every", True),
    "tokens": Plan((_SINGLE, Part(1, 1, True, 256), Part(2, 1, False, RING)), "last", False),
    "batch": Plan((_SINGLE, Part(1, 1, False, RING), Part(2, 64, True, 256), Part(3, 5, False, RING)), "last", False),
    "traced batch": Plan((_SINGLE, Part(1, 1, False, RING), Part(2, 64, True, 256)), "every", True),
}


@pytest.fixture(scope="module")
def device() -> Device:
    return Device(1, "CPU")


def all_of(hp: Hyperparameters, kind: T) -> dict[str, T]:
    """Every matrix of one type."""
    return {t.name: T.F32 if t.role in ALWAYS_F32 else kind for t in hp.tensors()}


def types_of(hp: Hyperparameters, name: str) -> dict[str, T]:
    """The types of a file of that type."""
    return {row.tensor.name: row.type for row in planned(hp, FILE_TYPES[name])}


def nodes(
    device: Device, hp: Hyperparameters, types: dict[str, T], plan: Plan, attention: Literal["flash", "plain"] = "flash"
) -> list[Node]:
    """The graph as a device other than the CPU gets it."""
    pool = Pool(device, hp, kv_type(types["token_embd.weight"]), lambda: None)
    pool.reserve(len(plan.parts))
    lying = Context(len(types))
    weights = {t.name: lying.new(t.shape, types[t.name]) for t in hp.tensors()}
    size = GgmlOps.tensors(hp, plan, plan.count)
    context = Context(size, nodes=size)
    ops = GgmlOps(context, weights, hp, pool, plan, tile=plan.count, attention=attention)
    logits = forward(ops, hp, ops.inputs.tokens, plan.rows)
    if isinstance(logits, Tensor):
        context.output(logits)
    return [node(device.lib, handle) for handle in context.nodes()]


def test_the_table_is_of_the_ggml_in_use() -> None:
    assert abi.GGML_VERSION == SOURCE


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("attention", ["flash", "plain"])
def test_every_graph_of_every_shape(
    device: Device, shape: str, plan: str, attention: Literal["flash", "plain"]
) -> None:
    hp = SHAPES[shape]
    found = nodes(device, hp, types_of(hp, "Q4_K_M"), PLANS[plan], attention)
    assert {op.op for op in found} >= {"GET_ROWS", "RMS_NORM", "MUL_MAT", "SET_ROWS"}
    assert [str(op) for op in found if not computes(op)] == []


@pytest.mark.parametrize("plan", ["token", "chunk"])
@pytest.mark.parametrize("kind", sorted(MATRIX_TYPES), ids=lambda t: t.name)
def test_every_type_of_matrix_everywhere(device: Device, kind: T, plan: str) -> None:
    hp = SHAPES["2b"]
    found = nodes(device, hp, all_of(hp, kind), PLANS[plan])
    assert kind in {op.src[0].type for op in found if op.op == "MUL_MAT"}
    assert [str(op) for op in found if not computes(op)] == []


@pytest.mark.parametrize("name", FILE_TYPES)
def test_every_file_type(device: Device, name: str) -> None:
    hp = SHAPES["demo"]
    for plan in ("token", "chunk", "batch"):
        found = nodes(device, hp, types_of(hp, name), PLANS[plan])
        assert [str(op) for op in found if not computes(op)] == []


def test_a_node_is_read_as_it_was_built(device: Device) -> None:
    """The table looks into ggml's struct: where that has changed, nothing it says holds."""
    g = Context(16, nodes=16)
    x, weight = g.new((5, 64)), g.new((3, 64), T.Q8_0)
    found = node(device.lib, g.matmul(weight, g.rows(x, 1, 4)).handle)
    assert (found.op, found.type, found.ne) == ("MUL_MAT", T.F32, (3, 3, 1, 1))
    assert [s.op for s in found.src] == ["NONE", "VIEW"]
    assert [s.type for s in found.src] == [T.Q8_0, T.F32]
    assert (found.src[1].ne, found.src[1].nb[:2]) == ((64, 3, 1, 1), (4, 256))
    assert str(found) == "MUL_MAT of Q8_0 [64, 3, 1, 1], F32 [64, 3, 1, 1] to F32"


def test_what_metal_does_not_compute_is_seen(device: Device) -> None:
    g, lib = Context(64, nodes=8), device.lib
    x, f16 = g.new((8, 48)), g.new((8, 48), abi.F16)
    across = g.transpose(x)  # its rows are not dense

    def plain(handle: int) -> Node:
        return node(lib, handle)

    refused = [
        plain(lib.ggml_add(g.handle, across.handle, across.handle)),
        plain(lib.ggml_sqrt(g.handle, across.handle)),
        plain(lib.ggml_mul_mat(g.handle, g.new((8, 48), T.I32).handle, x.handle)),
        plain(g.set_rows(g.new((8, 256), T.Q4_K), g.new((2, 256)), g.new((2,), abi.I64)).handle),
    ]
    q, ring, mask = g.new((4, 3, 20)), g.new((1, 9, 20), abi.F16), g.new((3, 9), abi.F16)
    refused.append(plain(g.attention(q, ring, ring, mask, 1.0).handle))  # heads of 20
    assert [op.op for op in refused if computes(op)] == []
    assert not computes(replace(plain(g.add(x, x).handle), op="CROSS_ENTROPY_LOSS"))
    assert computes(plain(g.add(x, x).handle))
    assert computes(plain(g.dense(g.transpose(f16)).handle))
    assert "CROSS_ENTROPY_LOSS" not in TABLE
