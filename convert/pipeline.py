"""The conversion: everything is checked first, then one pass over the checkpoint writes all the files."""

import re
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf import GGUFValueType
from gguf.utility import size_label
from numpy.typing import NDArray

from griffin_gguf.convert.adapter_config import AdapterConfig
from griffin_gguf.convert.checkpoint import FLOATS, Checkpoint
from griffin_gguf.convert.config import Config, read_config
from griffin_gguf.convert.files import read_text
from griffin_gguf.convert.hub import Source, resolve
from griffin_gguf.convert.lora import EMBEDDING, HEAD, Adapter, Weights, open_config
from griffin_gguf.convert.transforms import transformed
from griffin_gguf.convert.vocab import tokenizer_metadata
from griffin_gguf.quant import weighting
from griffin_gguf.quant.encode import EncodingError, Importance, encoder
from griffin_gguf.quant.file_types import FileType, Metadata, file_type
from griffin_gguf.quant.imatrix import ImportanceMatrix
from griffin_gguf.quant.recipes import plan
from griffin_gguf.quant.writer import Output, Progress, files, write
from griffin_gguf.runtime import arch
from griffin_gguf.runtime.atomic import check_targets
from griffin_gguf.runtime.errors import FileFormatError, GriffinError, UnsupportedError


def convert(
    checkpoint: str | Path,
    targets: Sequence[tuple[Path, str]],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    allow_unknown: bool = False,
    imatrix: ImportanceMatrix | None = None,
    max_bytes: int | None = None,
    loras: Sequence[Path] = (),
) -> list[Path]:
    """Write a checkpoint, a folder or `org/name` on the hub, as GGUF files: (file, file type) each.

    One pass over the checkpoint writes all files; memory does not grow with the model. `progress` is called
    with (done, total) bytes of the weights, counted as float32. `allow_unknown` ignores fields of config.json and
    tensors that nothing here knows. `imatrix` weighs the errors of quantization, and `max_bytes` splits files, as
    `quant.writer.Output` has it. `loras` are folders of PEFT's LoRA adapters, merged in that order, in float32, as
    the weights pass. Returns the files written.

    Raises `FileFormatError` or `UnsupportedError` for anything wrong with checkpoint, adapters or file types, and
    `GriffinError` for files that cannot be written or that are read here. All that can be known without reading
    the weights is checked before any file is begun, and no file that is not complete ever appears under its
    final name.
    """
    types = [file_type(name) for _, name in targets]
    check_targets([path for path, _ in targets], [imatrix.path] if imatrix else [])
    configs = [open_config(folder, allow_unknown) for folder in loras]
    source = resolve(checkpoint)
    for folder, what in ((source.folder, "checkpoint"), *((folder, "adapter") for folder in loras)):
        _refuse_own_files(folder, what, [path for path, _ in targets])
    with ExitStack() as opened:
        stored = opened.enter_context(Checkpoint(source.folder))
        model = _check(source, stored, allow_unknown, configs, opened)
        importance = weighting.importance_of(imatrix, model.hp)
        paths = zip(types, [path for path, _ in targets], strict=True)
        outputs = [_output(model, type, path, imatrix, importance, max_bytes) for type, path in paths]
        try:
            rows = encoder(model.read, importance)
            write(outputs, rows, threads=threads, progress=progress, check=model.weights.check_unchanged)
        except EncodingError as error:
            raise _blamed(model, error) from None
    return [file.path for output in outputs for file in files(output)]


def _refuse_own_files(folder: Path, what: str, targets: Sequence[Path]) -> None:
    """A target must not replace what is read. GGUF files may lie in such a folder: they are no part of it."""
    for target in targets:
        for file in folder.iterdir() if target.exists() else ():
            if file.suffix != ".gguf" and file.exists() and file.samefile(target):
                raise GriffinError(f"{target}: is a file of the {what}; expected another path")


@dataclass(frozen=True)
class _Model:
    """A checkpoint that is known to be whole, and its adapters to fit."""

    source: Source
    weights: Weights
    hp: arch.Hyperparameters
    vocabulary: Metadata

    def read(self, tensor: arch.Tensor, start: int, stop: int) -> NDArray[np.float32]:
        """Rows of a tensor in GGUF's layout: what `quant.writer.write` asks for."""

        def rows(first: int, last: int) -> NDArray[np.float32]:
            found = self.weights.rows(tensor.source)(first, last)
            if tensor.role is arch.Role.VECTOR and not np.isfinite(found).all():
                file = self.weights.file(tensor.source)  # before a transform makes a number of it
                raise FileFormatError(file, tensor.source, "holds NaN or infinity")
            return found

        return transformed(tensor, rows, start, stop)


def _check(
    source: Source, stored: Checkpoint, allow_unknown: bool, loras: Sequence[AdapterConfig], opened: ExitStack
) -> _Model:
    """Everything that can be wrong with a checkpoint and its adapters but the values of their weights."""
    config = read_config(source.folder / "config.json", allow_unknown)
    expected = {tensor.source: tensor for tensor in replace(config.hp, untied=True).tensors()}
    for tensor in expected.values():
        if tensor.source != HEAD or HEAD in stored.tensors:
            _check_tensor(stored, tensor)
    for name, found in stored.tensors.items():
        if name not in expected and not allow_unknown:
            raise FileFormatError(found.file, name, "is no tensor of this model; --allow-unknown ignores it")
    vocabulary = tokenizer_metadata(source.folder, config)
    adapters = [opened.enter_context(closing(Adapter(lora, expected, allow_unknown))) for lora in loras]
    tied = not _untied(stored, config)
    weights = Weights(stored, adapters, tied, shared=tied and config.tied)
    return _Model(source, weights, replace(config.hp, untied=weights.untied), vocabulary)


def _check_tensor(stored: Checkpoint, tensor: arch.Tensor) -> None:
    found = stored.tensors.get(tensor.source)
    if found is None:
        raise FileFormatError(stored.folder, tensor.source, "the tensor is missing")
    if found.shape != tensor.source_shape:
        problem = f"expected shape {tensor.source_shape} by config.json, found {found.shape}"
        raise FileFormatError(found.file, tensor.source, problem)
    if found.dtype not in FLOATS:
        raise FileFormatError(found.file, tensor.source, f"expected {', '.join(FLOATS)}, found {found.dtype}")


def _untied(stored: Checkpoint, config: Config) -> bool:
    """Whether the head has weights of its own: as in transformers, the tensors decide, not the config."""
    if HEAD not in stored.tensors:
        if not config.tied:
            problem = "the tensor is missing, and config.json says tie_word_embeddings = false"
            raise FileFormatError(stored.folder, HEAD, problem)
        return False
    return not stored.equal(EMBEDDING, HEAD)


def _output(
    model: _Model,
    type: FileType,
    path: Path,
    imatrix: ImportanceMatrix | None,
    importance: Importance,
    max_bytes: int | None,
) -> Output:
    """One file to write; raises `UnsupportedError` where its type needs an importance matrix."""
    planned = plan(model.hp, type, imatrix=imatrix is not None)
    for line in weighting.lacking(planned, type, importance, imatrix):
        raise UnsupportedError(line)
    return Output(path, _metadata(model, type) | weighting.keys(imatrix, type), planned, max_bytes)


def _metadata(model: _Model, type: FileType) -> Metadata:
    """All keys of one file."""
    hyperparameters: Metadata = {
        name: (value, kind, GGUFValueType.BOOL if kind is GGUFValueType.ARRAY else None)
        for name, (value, kind) in arch.to_metadata(model.hp).items()
    }
    return _general(model) | type.metadata | hyperparameters | model.vocabulary


def _general(model: _Model) -> Metadata:
    text = {
        "general.architecture": arch.ARCHITECTURE,
        "general.type": "model",
        "general.name": model.source.name,
        "general.size_label": size_label(model.hp.parameters, 0, 0, 0),
    }
    if model.source.repository:
        text["general.source.huggingface.repository"] = model.source.repository
    license = _license(model.source.folder)
    if license:
        text["general.license"] = license
    keys: Metadata = {name: (value, GGUFValueType.STRING, None) for name, value in text.items()}
    names = [adapter.name for adapter in model.weights.adapters]
    return keys | ({"griffin.lora": (names, GGUFValueType.ARRAY, GGUFValueType.STRING)} if names else {})


def _license(folder: Path) -> str | None:
    """The licence that the model card, if there is one, names in its front matter."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", read_text(card).replace("\r\n", "\n"), re.DOTALL)
    found = re.search(r"^license:\s*([\w.+-]+)\s*$", front[1], re.MULTILINE) if front else None
    return found[1] if found else None


def _blamed(model: _Model, error: EncodingError) -> GriffinError:
    """Blame a value that cannot be encoded on the checkpoint's tensor."""
    source = next(tensor.source for tensor in model.hp.tensors() if tensor.name == error.tensor)
    adapter = model.weights.changed.get(source)
    merged = f", with {adapter.folder} merged" if adapter else ""
    return FileFormatError(model.weights.file(source), source, error.problem + merged)
