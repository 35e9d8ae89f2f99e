"""How an importance matrix enters a quantization: which tensors it weighs, which lack it, the keys that tell of it."""

from collections.abc import Sequence

from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType

from griffin_gguf.quant.encode import NEEDS_IMPORTANCE, Importance
from griffin_gguf.quant.file_types import PLAIN, FileType, Metadata
from griffin_gguf.quant.imatrix import ImportanceMatrix
from griffin_gguf.quant.recipes import Planned, needs_importance
from griffin_gguf.runtime.arch import Hyperparameters


def importance_of(imatrix: ImportanceMatrix | None, hp: Hyperparameters) -> Importance:
    """Look up the means by a weight's name; raises `FileFormatError` where the matrix is another model's."""
    if imatrix is None:
        return lambda name: None
    fitted = imatrix.fitted(hp)
    return {name: fitted.importance(name) for name in fitted.entries}.get


def lacking(
    planned: Sequence[Planned], recipe: FileType, importance: Importance, imatrix: ImportanceMatrix | None
) -> list[str]:
    """One line for each tensor whose type wants an importance that is not known."""
    if imatrix:
        advice = f"and {imatrix.path} has no entry of it; --tensor-type can give it another type"
    else:
        advice = "which griffin imatrix makes, and --imatrix gives it"
    return [
        f"{row.tensor.name}: {row.type.name} in a file of type {recipe.name} needs an importance matrix, {advice}"
        for row in planned
        if importance(row.tensor.name) is None and (row.type in NEEDS_IMPORTANCE or needs_importance(row, recipe))
    ]


def unweighted(planned: Sequence[Planned], imatrix: ImportanceMatrix | None, hp: Hyperparameters) -> list[str]:
    """One line for each tensor that is quantized, and could be weighed, but is not in the matrix that was given."""
    if imatrix is None:
        return []
    types = {row.tensor.name: row.type for row in planned}
    return [
        f"{name}: is not in {imatrix.path}: its errors are not weighed"
        for name in imatrix.missing(hp)
        if types[name] not in PLAIN and types[name] is not T.Q8_0
    ]


def keys(imatrix: ImportanceMatrix | None, recipe: FileType) -> Metadata:
    """The keys by which llama-quantize tells of its importance matrix, where there is one and it is of use."""
    if imatrix is None or not recipe.quantized:
        return {}
    texts = {"quantize.imatrix.file": imatrix.path.name, "quantize.imatrix.dataset": ", ".join(imatrix.datasets)}
    counts = {
        "quantize.imatrix.entries_count": len(imatrix.entries),
        "quantize.imatrix.chunks_count": imatrix.chunk_count,
    }
    found: Metadata = {name: (text, GGUFValueType.STRING, None) for name, text in texts.items()}
    return found | {name: (count, GGUFValueType.UINT32, None) for name, count in counts.items()}
