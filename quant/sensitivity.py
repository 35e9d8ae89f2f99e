"""What each tensor costs in each type: the KL divergence that it would add to the file's own model, in nats.

To first order the errors of quantization are independent, so divergences add up; and a tensor's divergence is
proportional to its squared error, each column weighted with the mean square of what it is multiplied with. On the
demo model that holds within some 15% for all types of a tensor from 1.6 to 4.5 bits, and within a fifth for sums over
whole files from 3 to 6 bits. Beyond, it says too little: CPUs round what a quantized matrix is multiplied with to 8
bits, which at Q6_K and Q8_0 costs about as much as the rounding of the weights, and is not counted. So

    cost(tensor, type) = error(tensor, type) · s(group),    s = (KL(group in Q3_K) - floor) / error(group in Q3_K)

Errors are those of the real encoder on a sample of rows; s takes one run of the model a group. Below some 10⁻⁵ nats
a divergence is the rounding of activations to the weights' type rather than an error: any change of a weight rolls
the dice anew in all layers after it. It is paid once, whatever is quantized, so it must not be counted at every
tensor: the floor is what a tensor costs that has become F32, its values unchanged. It falls with the depth, to 0.

Without a text there are no runs, and s comes from the roles: see `_PRIOR`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from gguf.quants import dequantize as decoded
from numpy.typing import NDArray

from griffin_gguf.quant.bench import Bench
from griffin_gguf.quant.collect import fingerprint
from griffin_gguf.quant.encode import NEEDS_IMPORTANCE, encode
from griffin_gguf.quant.mix import Option
from griffin_gguf.quant.recipes import row_bytes
from griffin_gguf.runtime.arch import Hyperparameters, Role, Tensor
from griffin_gguf.runtime.atomic import atomic
from griffin_gguf.runtime.errors import FileFormatError, UnsupportedError

#: (what is going on, done, total).
Progress = Callable[[str, int, int], None]

#: Tokens of text that a whole mix is measured on, unless told otherwise.
TOKENS = 2048

#: And those that a group is: mixes chosen by costs of 256 tokens or of 2,048 are equally good.
_GROUP_TOKENS = 512

#: Types to choose among, beside the file's own, smallest first.
CANDIDATES = (
    T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.Q2_K, T.IQ3_XXS, T.Q3_K, T.IQ3_S, T.IQ4_XS, T.Q4_K, T.Q5_K,
    T.Q6_K, T.Q8_0, T.BF16, T.F16,
)  # fmt: skip

#: The same for rows that are no multiple of 256.
_CANDIDATES_ODD = (T.Q4_0, T.IQ4_NL, T.Q5_0, T.Q5_1, T.Q8_0, T.BF16, T.F16)

#: A group is measured in the first of these that it may have: coarse enough to stand out, and quick to encode.
_MEASURED = (T.Q3_K, T.Q4_0)

#: Weights up to which each tensor is a group of its own; beyond, those of one name in a quarter of the depth are.
_TENSORWISE = 100_000_000

#: Of a file of costs, which takes some 1 KB a tensor.
_MOST_BYTES = 1 << 25

#: Weights of a tensor that its errors are estimated on.
_SAMPLE = 1 << 17

#: Nats by which a tensor of the role costs more for each part of its energy that turns into error, where no text
#: can tell: what the demo model's tensors cost, a tied embedding as the head.
_PRIOR = {
    Role.EMBEDDING: 1.1,
    Role.OUTPUT: 1.1,
    Role.ATTN_Q: 0.003,
    Role.ATTN_K: 0.0045,
    Role.ATTN_V: 0.0055,
    Role.ATTN_OUTPUT: 0.003,
    Role.FFN_GATE: 0.024,
    Role.FFN_UP: 0.018,
    Role.FFN_DOWN: 0.024,
    Role.RECURRENT_LINEAR: 0.027,
    Role.RECURRENT_GATE: 0.0035,
}


@dataclass(frozen=True)
class Costs:
    """What each tensor may be and what that costs, by tensor name in file order; vectors have F32 alone.

    `unit` says what costs are: nats of divergence, or an estimate of them by role. `fingerprint` is of all that they
    follow from: the file, the text, the importance matrix.
    """

    fingerprint: str
    unit: Literal["nats", "estimate"]
    options: Mapping[str, tuple[Option, ...]]

    def save(self, path: Path) -> None:
        """Write them as JSON, whole or not at all. Raises `GriffinError` naming `path`."""
        rows = {name: [[o.type.name, o.nbytes, o.cost] for o in options] for name, options in self.options.items()}
        content = {"fingerprint": self.fingerprint, "unit": self.unit, "options": rows}
        with atomic(path) as file:
            file.write(json.dumps(content, indent=1).encode())

    @classmethod
    def load(cls, path: Path, bench: Bench) -> Self:
        """Read what `save` wrote for the same file, text and importance matrix.

        Raises `FileFormatError` for anything else, `UnsupportedError` for costs of another file, text or matrix.
        """
        try:
            with path.open("rb") as file:
                content: Any = json.loads(file.read(_MOST_BYTES))
            rows: dict[str, list[tuple[str, int, float]]] = content["options"]
            options = {name: tuple(Option(T[t], int(n), float(c)) for t, n, c in found) for name, found in rows.items()}
            found = cls(str(content["fingerprint"]), content["unit"], options)
        except OSError as error:
            raise FileFormatError(path, "file", f"cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise FileFormatError(path, "costs", "are not what this program writes; expected its JSON") from None
        if found.fingerprint != _fingerprint(bench):
            raise UnsupportedError(f"{path}: costs are of another file, text or importance matrix")
        return found


def measure_costs(bench: Bench, progress: Progress | None = None) -> Costs:
    """Find what every tensor costs in every type that it may have: one run a group, one for the floor.

    Raises what `Bench.divergence` raises, and `FileFormatError` for weights that a type cannot hold.
    """
    names = list(bench.tensors)
    errors: dict[str, dict[T, float]] = {}
    energies: dict[str, float] = {}
    for done, name in enumerate(names, 1):
        errors[name], energies[name] = _errors(bench, name)
        if progress:
            progress("encoding samples", done, len(names))
    if bench.text:
        weights = _measured(bench, errors, progress)
    else:
        weights = {name: _PRIOR[bench.tensors[name].role] / (energies[name] or 1.0) for name in names}
    options: dict[str, tuple[Option, ...]] = {}
    for name, info in bench.file.tensors.items():
        own = Option(info.type, info.nbytes, 0.0)
        rows, columns = prod(info.shape[:-1]), info.shape[-1]
        others = errors.get(name, {}).items()
        rest = (Option(t, rows * row_bytes(t, columns), weights[name] * e) for t, e in others)
        options[name] = (*rest, own)
    return Costs(_fingerprint(bench), "nats" if bench.text else "estimate", options)


def _candidates(bench: Bench, name: str) -> list[T]:
    """Types smaller than the tensor's own that fit its rows, smallest first."""
    columns = bench.tensors[name].shape[-1]
    most = row_bytes(bench.own_type(name), columns)
    lacking = NEEDS_IMPORTANCE if bench.importance(name) is None else frozenset[T]()
    return [
        type
        for type in (_CANDIDATES_ODD if columns % 256 else CANDIDATES)
        if columns % GGML_QUANT_SIZES[type][0] == 0 and type not in lacking and row_bytes(type, columns) < most
    ]


def _errors(bench: Bench, name: str) -> tuple[dict[T, float], float]:
    """The weighted squared error of each candidate, and the weighted energy of the tensor, from a sample of rows."""
    tensor = bench.tensors[name]
    matrices = tensor.shape[0] if len(tensor.shape) == 3 else 1
    height, columns = prod(tensor.shape[:-1]) // matrices, tensor.shape[-1]
    count = min(height, -(-_SAMPLE // (matrices * columns)))
    taken = np.unique(np.linspace(0, height - 1, count).round().astype(np.int64))
    importance = bench.importance(name)
    pieces: list[tuple[NDArray[np.float32], NDArray[np.float32] | None]] = []
    for g in range(matrices):
        rows = np.concatenate([bench.rows(tensor, g * height + int(i), g * height + int(i) + 1) for i in taken])
        pieces.append((rows, None if importance is None else importance[g]))
    candidates = _candidates(bench, name)
    found = np.zeros(len(candidates))

    def add(index: int) -> None:
        type = candidates[index]
        for rows, weights in pieces:
            found[index] += _weighted(rows - decoded(encode(type, rows, weights), type), weights)

    bench.each(add, range(len(candidates)))
    scale = height / len(taken)
    energy = sum(_weighted(rows, weights) for rows, weights in pieces)
    return dict(zip(candidates, (found * scale).tolist(), strict=True)), energy * scale


def _weighted(rows: NDArray[np.float32], weights: NDArray[np.float32] | None) -> float:
    """The sum of squares, each column weighted."""
    columns = np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
    return float(columns.sum() if weights is None else columns @ weights.astype(np.float64))


def groups_of(tensors: Sequence[Tensor], hp: Hyperparameters) -> list[list[str]]:
    """Names of tensors that are measured together; see `_TENSORWISE`."""
    found: dict[tuple[str, int], list[str]] = {}
    for tensor in tensors:
        part = tensor.layer if hp.parameters <= _TENSORWISE else 4 * tensor.layer // hp.layers
        found.setdefault((tensor.spec.name, part), []).append(tensor.name)
    return list(found.values())


def _measured(bench: Bench, errors: Mapping[str, Mapping[T, float]], progress: Progress | None) -> dict[str, float]:
    """Nats by which each tensor costs more per unit of error, measured group by group."""
    groups = [group for group in groups_of(list(bench.tensors.values()), bench.hp) if all(errors[n] for n in group)]
    runs, predicted = 1 + len(groups), min(len(bench.text) - 1, _GROUP_TOKENS)
    done = 0

    def run(types: Mapping[str, T]) -> float:
        nonlocal done

        def watch(at: int, _: int) -> None:
            if progress:
                progress("measuring", done * predicted + at, runs * predicted)

        found = bench.divergence(types, watch, tokens=predicted).mean
        done += 1
        return found

    first = next(tensor for tensor in bench.tensors.values() if tensor.layer == 0)
    floor = run({first.name: T.F32})
    found: dict[str, float] = {}
    for group in groups:
        types = {name: next((t for t in _MEASURED if t in errors[name]), list(errors[name])[-1]) for name in group}
        far = run(types)
        depth = sum(max(bench.tensors[name].layer, 0) for name in group) / (len(group) * bench.hp.layers)
        error = sum(errors[name][type] for name, type in types.items())
        # A tenth at least, where what is measured is hardly above the floor.
        cost = max(far - floor * (1 - depth), far / 10)
        found |= dict.fromkeys(group, cost / error if error else 0.0)
    return found


def _fingerprint(bench: Bench) -> str:
    """SHA-256 over all that costs follow from."""
    digest = hashlib.sha256(f"{fingerprint(bench.file)} {bench.text}".encode())
    for name in bench.tensors:
        importance = bench.importance(name)
        digest.update(b"-" if importance is None else importance.tobytes())
    return digest.hexdigest()
