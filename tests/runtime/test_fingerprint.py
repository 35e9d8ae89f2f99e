"""A fingerprint tells models apart, and nothing else."""

import json
import re
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import griffins
import pytest
from gguf import GGUFReader, GGUFValueType
from rewriting import rewritten
from splitting import split

from griffin_gguf.quant.encode import encoder
from griffin_gguf.quant.file_types import file_type
from griffin_gguf.quant.recipes import plan
from griffin_gguf.quant.writer import Output, write
from griffin_gguf.runtime.arch import CHECKSUMS, Hyperparameters
from griffin_gguf.runtime.errors import FileFormatError
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.saved_state import fingerprint

HP = griffins.tiny(layers=3, recurrent=(True, False, True))
WEIGHTS = griffins.weights(HP)


def model(path: Path, kind: str = "Q8_0", hp: Hyperparameters = HP, weights: griffins.Weights = WEIGHTS) -> Path:
    recipe = file_type(kind)
    rows = plan(hp, recipe)
    write([Output(path, griffins.metadata(hp) | recipe.metadata, rows)], encoder(griffins.reader(weights)))
    return path


def fingerprint_of(path: Path) -> str:
    with GgufFile.open(path) as file:
        return fingerprint(file)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("model") / "a.gguf")


def test_a_fingerprint_is_of_the_model_and_not_of_its_files(gguf: Path, tmp_path: Path) -> None:
    expected = fingerprint_of(gguf)
    assert re.fullmatch("[0-9a-f]{64}", expected)
    assert fingerprint_of(model(tmp_path / "again.gguf")) == expected
    assert fingerprint_of(split(gguf, tmp_path, split_max_tensors=7)) == expected


def test_a_fingerprint_is_what_is_documented(gguf: Path) -> None:
    with GgufFile.open(gguf) as file:
        keys = {name: value for name, value in file.metadata.items() if name.startswith("recurrentgemma.")}
        lines = [json.dumps(dict(sorted(keys.items())))]
        for tensor, checksum in sorted(zip(GGUFReader(gguf).tensors, file.metadata[CHECKSUMS], strict=True)):
            raw = tensor.data.tobytes()
            spots = [i * (len(raw) - 4096) // 3 for i in range(4)]
            samples = b"".join(raw[at : at + 4096] for at in spots) if len(raw) > 16384 else raw
            shape = [int(n) for n in reversed(tensor.shape)]
            lines.append(
                json.dumps([tensor.name, tensor.tensor_type.name, shape, checksum, sha256(samples).hexdigest()])
            )
    assert fingerprint_of(gguf) == sha256("\n".join(lines).encode()).hexdigest()


def test_what_is_another_model_has_another_fingerprint(gguf: Path, tmp_path: Path) -> None:
    changed = {name: array.copy() for name, array in WEIGHTS.items()}
    changed["blk.1.ffn_up.weight"][-1, 100] += 1
    others = [
        gguf,
        model(tmp_path / "f16.gguf", "F16"),
        model(tmp_path / "q4.gguf", "Q4_K_M"),
        model(tmp_path / "window.gguf", hp=griffins.tiny(layers=3, recurrent=(True, False, True), window=32)),
        model(tmp_path / "weights.gguf", weights=changed),
    ]
    assert len({fingerprint_of(path) for path in others}) == len(others)


def test_a_model_without_checksums_is_known_by_samples(gguf: Path, tmp_path: Path) -> None:
    bare = rewritten(gguf, tmp_path / "bare.gguf", griffin__tensor_sha256=None)
    expected = fingerprint_of(bare)
    assert expected != fingerprint_of(gguf)
    assert fingerprint_of(split(bare, tmp_path, split_max_tensors=7)) == expected
    with GgufFile.open(bare) as file:
        info = file.tensors["token_embd.weight"]
        spots = [info.offset, info.offset + info.nbytes - 1, file.tensors["output_norm.weight"].offset + 501]
    assert info.nbytes > 5 * 4096
    raw = bare.read_bytes()
    for at in spots:
        bare.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        assert fingerprint_of(bare) != expected


def test_a_tensor_changed_behind_its_checksum_shows_in_the_samples(gguf: Path, tmp_path: Path) -> None:
    with GgufFile.open(gguf) as file:
        at = file.tensors["blk.0.ssm_x.weight"].offset + 5
    raw = gguf.read_bytes()
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    assert fingerprint_of(changed) != fingerprint_of(gguf)


@pytest.mark.parametrize("spoil", [lambda old: old[1:], lambda old: [*old[1:], "x"], lambda old: list(range(len(old)))])
def test_checksums_that_are_none_are_refused(gguf: Path, spoil: Callable[[list[str]], list[Any]]) -> None:
    with GgufFile.open(gguf) as file:
        recorded = spoil(file.metadata[CHECKSUMS])
        file.metadata[CHECKSUMS] = recorded
        if not isinstance(recorded[0], str):
            file.types[CHECKSUMS] = (GGUFValueType.ARRAY, GGUFValueType.INT32)
        with pytest.raises(FileFormatError, match=rf"a\.gguf: {re.escape(CHECKSUMS)}.*: expected"):
            fingerprint(file)
