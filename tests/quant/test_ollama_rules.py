"""Every rule broken once, in a file put together byte by byte; this project's own files keep them all."""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType as V
from hypothesis import given
from hypothesis import strategies as st
from models import random_model
from splitting import split

import griffin_gguf.cli
from griffin_gguf.convert.pipeline import convert
from griffin_gguf.quant import ollama_rules
from griffin_gguf.quant.file_types import FILE_TYPES, FileType
from griffin_gguf.quant.ollama_rules import FAR, GEMMA, RULES, Findings, check_for_ollama, is_near
from griffin_gguf.quant.recipes import plan
from griffin_gguf.quant.writer import Output, file_size, header
from griffin_gguf.runtime.errors import FileFormatError
from griffin_gguf.runtime.gguf_file import GgufFile

DEMO = Path(griffin_gguf.cli.__file__).with_name("demo_model")
LAYOUTS = {V.UINT16: "<H", V.UINT32: "<I", V.INT32: "<i", V.UINT64: "<Q", V.FLOAT32: "<f", V.BOOL: "<?"}


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(kind: V, content: Any) -> bytes:
    """A key's type and value; an array's content is (element type, values)."""
    if kind is V.ARRAY:
        element, values = content
        inner = b"".join(value(element, one)[4:] for one in values)
        return struct.pack("<IIQ", kind, element, len(values)) + inner
    return struct.pack("<I", kind) + (text(content) if kind is V.STRING else struct.pack(LAYOUTS[kind], content))


def sound_keys() -> dict[str, tuple[V, Any]]:
    return {
        "general.architecture": (V.STRING, "recurrentgemma"),
        "general.type": (V.STRING, "model"),
        "general.file_type": (V.UINT32, 1),
        "recurrentgemma.block_count": (V.UINT32, 26),
        "recurrentgemma.embedding_length": (V.UINT32, 2560),
        "recurrentgemma.context_length": (V.UINT32, 8192),
        "recurrentgemma.attention.head_count": (V.UINT32, 10),
        "recurrentgemma.attention.head_count_kv": (V.UINT32, 1),
        "tokenizer.ggml.model": (V.STRING, "llama"),
        "tokenizer.ggml.pre": (V.STRING, "default"),
        "tokenizer.ggml.tokens": (V.ARRAY, (V.STRING, ["<eos>", "a"])),
        "tokenizer.ggml.add_bos_token": (V.BOOL, True),
        "tokenizer.chat_template": (V.STRING, GEMMA),
    }


@dataclass
class Parts:
    """A GGUF to be: tensors are name -> (dimensions, type, offset)."""

    magic: bytes = b"GGUF"
    version: int = 3
    keys: dict[str, tuple[V, Any]] = field(default_factory=sound_keys)
    tensors: dict[str, tuple[list[int], int, int]] = field(
        default_factory=lambda: {"a": ([64, 2], 0, 0), "b": ([32, 3], 8, 512)}  # F32 and Q8_0
    )
    data: int = 512 + 3 * 34
    more_keys: int = 0  # than there are

    def write(self, path: Path) -> Path:
        raw = self.magic + struct.pack("<IQQ", self.version, len(self.tensors), len(self.keys) + self.more_keys)
        for name, (kind, content) in self.keys.items():
            raw += text(name) + value(kind, content)
        for name, (dims, kind, offset) in self.tensors.items():
            raw += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
        with path.open("wb") as file:
            file.write(raw)
            file.truncate(-(-len(raw) // 32) * 32 + self.data)
        return path


Change = Callable[[Parts], Any]


def key(name: str, kind: V | None, content: Any = None) -> Change:
    """Give a key another value, or with None take it out."""

    def change(parts: Parts) -> None:
        parts.keys.pop(name, None)
        if kind is not None:
            parts.keys[name] = (kind, content)

    return change


def tensor(dims: list[int], kind: int = 0, offset: int = 0) -> Change:
    return lambda parts: parts.tensors.update(c=(dims, kind, offset))


def set_to(**values: Any) -> Change:
    return lambda parts: [setattr(parts, name, value) for name, value in values.items()]


ARCH = "recurrentgemma."

#: Rule -> ways of breaking it alone, with the field that is named and what is found there.
BROKEN: dict[str, list[tuple[Change, str, str]]] = {
    "magic": [(set_to(magic=b"GGML"), "magic", "b'GGML'"), (set_to(magic=b"gguf"), "magic", "b'gguf'")],
    "version": [(set_to(version=4), "version", "4")],
    "header": [
        (set_to(more_keys=2**40), "header", "bytes, "),
        (set_to(more_keys=1), "header", "are left"),
    ],
    "strings": [
        (key("general.name", V.STRING, "x" * ((16 << 20) + 1)), "general.name", "one of 16777217 bytes"),
        (key("general.tags", V.ARRAY, (V.STRING, ["a", "x" * ((16 << 20) + 1)])), "general.tags", "16777217 bytes"),
        (key("x" * ((16 << 20) + 1), V.UINT32, 1), "names", "one of 16777217 bytes"),
    ],
    "arrays": [],  # by its own test: 64 Mi elements do not fit into a header
    "one file": [(key("split.count", V.UINT16, 3), "split.count", "3 files")],
    "alignment": [
        (key("general.alignment", V.UINT32, 0), "general.alignment", "UINT32 '0'"),
        (key("general.alignment", V.UINT32, 24), "general.alignment", "UINT32 '24'"),
        (key("general.alignment", V.UINT64, 32), "general.alignment", "UINT64 '32'"),
    ],
    "dimensions": [(tensor([1] * 5), "c", "5"), (tensor([]), "c", "0")],
    "overflow": [
        (tensor([4194305, 4194305, 211106198978564]), "c", "dimensions [4194305, 4194305, 211106198978564]"),
        (tensor([32, 0]), "c", "dimensions [32, 0]"),
    ],
    "tensor type": [(tensor([32], 4), "c", "type 4"), (tensor([32], 2**31), "c", "type 2147483648")],
    "rows": [(tensor([48, 4], 8), "c", "rows of 48 elements in blocks of 32"), (tensor([32], 12), "c", "of 256")],
    "inside the file": [
        (tensor([1024, 1024]), "c", "past the "),
        (tensor([1], 0, 2**40), "c", "past the "),
        (set_to(data=512 + 3 * 34 - 1), "b", "past the "),
    ],
    "architecture": [(key("general.architecture", V.UINT32, 7), "general.architecture", "UINT32 '7'")],
    "kind": [
        (key("general.type", None), "general.type", "none"),
        (key("general.type", V.STRING, "adapter"), "general.type", "STRING 'adapter'"),
    ],
    "file type": [
        (key("general.file_type", None), "general.file_type", "none"),
        (key("general.file_type", V.INT32, 1), "general.file_type", "INT32 '1'"),
        (key("general.file_type", V.UINT32, 999), "general.file_type", "UINT32 '999'"),
    ],
    "block_count": [(key(ARCH + "block_count", V.UINT64, 26), ARCH + "block_count", "UINT64 '26'")],
    "embedding_length": [(key(ARCH + "embedding_length", V.INT32, 9), ARCH + "embedding_length", "INT32 '9'")],
    "context_length": [(key(ARCH + "context_length", None), ARCH + "context_length", "none")],
    "attention.head_count": [(key(ARCH + "attention.head_count", V.UINT32, 0), ARCH + "attention.head_count", "'0'")],
    "attention.head_count_kv": [
        (key(ARCH + "attention.head_count_kv", V.FLOAT32, 1.0), ARCH + "attention.head_count_kv", "FLOAT32 '1.0'")
    ],
    "tokenizer": [(key("tokenizer.ggml.model", None), "tokenizer.ggml.model", "none")],
    "pre-tokenizer": [(key("tokenizer.ggml.pre", V.BOOL, True), "tokenizer.ggml.pre", "BOOL 'True'")],
    "tokens": [
        (key("tokenizer.ggml.tokens", None), "tokenizer.ggml.tokens", "none"),
        (key("tokenizer.ggml.tokens", V.ARRAY, (V.UINT32, [1, 2])), "tokenizer.ggml.tokens", "UINT32"),
        (key("tokenizer.ggml.tokens", V.STRING, "a"), "tokenizer.ggml.tokens", "STRING"),
    ],
    "BOS": [(key("tokenizer.ggml.add_bos_token", V.UINT32, 1), "tokenizer.ggml.add_bos_token", "UINT32 '1'")],
    "quantizable": [(key("general.file_type", V.UINT32, 0), "general.file_type", "0 (F32)")],
    "chat template": [
        (key("tokenizer.chat_template", None), "tokenizer.chat_template", "none: "),
        (key("tokenizer.chat_template", V.STRING, "{{ messages }}"), "tokenizer.chat_template", "another: "),
        (key("tokenizer.chat_template", V.UINT32, 1), "tokenizer.chat_template", "UINT32"),
    ],
}  # fmt: skip


def changed(path: Path, change: Change) -> Findings:
    parts = Parts()
    change(parts)
    return check_for_ollama(parts.write(path))


def test_a_sound_file_keeps_every_rule(tmp_path: Path) -> None:
    assert changed(tmp_path / "m.gguf", lambda parts: None) == Findings([], [])
    assert changed(tmp_path / "m.gguf", set_to(version=2)) == Findings([], [])
    assert changed(tmp_path / "m.gguf", key("general.alignment", V.UINT32, 64)).odd == []


def test_every_rule_is_broken_below() -> None:
    assert [rule.name for rule in RULES] == list(BROKEN)


@pytest.mark.parametrize(
    ("name", "way"), [(name, way) for name, ways in BROKEN.items() for way in range(len(ways))], ids=str
)
def test_a_broken_rule_is_one_line_with_field_expected_and_found(tmp_path: Path, name: str, way: int) -> None:
    change, field, found = BROKEN[name][way]
    rule = next(rule for rule in RULES if rule.name == name)
    path = tmp_path / "m.gguf"
    findings = changed(path, change)
    (line,) = findings.odd if rule.odd else findings.broken
    assert line.startswith(f"{path}: {field[:100]}")
    assert f": expected {rule.expected}, found " in line
    assert found in line.rpartition("found ")[2]
    assert "\n" not in line
    assert not (findings.broken if rule.odd else findings.odd)


def test_an_array_of_more_elements_than_ollama_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollama_rules, "MAX_ARRAY", 1)
    (line,) = changed(tmp_path / "m.gguf", lambda parts: None).broken
    assert "tokenizer.ggml.tokens: expected none of more than " in line
    assert line.endswith("found 2 elements")


def test_several_broken_rules_are_all_named(tmp_path: Path) -> None:
    def change(parts: Parts) -> None:
        for each in ("general.type", "tokenizer.ggml.pre", ARCH + "context_length"):
            del parts.keys[each]
        parts.keys["general.alignment"] = (V.UINT32, 0)
        parts.tensors["c"] = ([48, 4], 8, 0)

    lines = changed(tmp_path / "m.gguf", change).broken
    assert [line.split(": ")[1] for line in lines] == [
        "general.alignment", "c", "general.type", ARCH + "context_length", "tokenizer.ggml.pre"
    ]  # fmt: skip


def test_a_header_that_is_cut_names_no_key_that_was_not_read(tmp_path: Path) -> None:
    path = Parts().write(tmp_path / "m.gguf")
    raw = path.read_bytes()
    for length in range(4, 24 + 700, 7):
        path.write_bytes(raw[:length])
        findings = check_for_ollama(path)
        assert findings.odd == []
        assert "header: expected all that it counts, found " in findings.broken[-1]
        assert len(findings.broken) == (2 if length < 8 else 1)  # and no version


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"absent\.gguf: file: cannot be read: No such file"):
        check_for_ollama(tmp_path / "absent.gguf")


@given(flips=st.lists(st.tuples(st.integers(0, 1199), st.integers(1, 255)), min_size=1, max_size=6))
def test_damage_anywhere_raises_nothing(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    path = Parts().write(tmp_path / "m.gguf")
    raw = bytearray(path.read_bytes())
    for at, flip in flips:
        raw[at] ^= flip
    path.write_bytes(raw)
    findings = check_for_ollama(path)
    assert all(line.startswith(f"{path}: ") for line in findings.broken + findings.odd)


# ---- this project's own files


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "demo.gguf"
    convert(DEMO, [(path, "BF16")])
    return path


@pytest.mark.parametrize("type", FILE_TYPES.values(), ids=FILE_TYPES)
def test_our_files_of_every_type_keep_them(demo: Path, tmp_path: Path, type: FileType) -> None:
    """The header of each as the writer makes it; of the data only the size matters here."""
    with GgufFile.open(demo) as file:
        keys = {name: (value, *file.types[name]) for name, value in file.metadata.items()}
        output = Output(tmp_path / "m.gguf", keys | type.metadata, plan(file.hyperparameters(), type, imatrix=True))
    with output.path.open("wb") as made:
        made.write(header(output))
        made.truncate(file_size(output))
    findings = check_for_ollama(output.path)
    assert findings.broken == []
    assert [line.split(": ")[1] for line in findings.odd] == (["general.file_type"] if type.name == "F32" else [])


def test_a_written_file_keeps_them_and_its_parts_do_not(tmp_path: Path) -> None:
    path = random_model(tmp_path, "F16")
    findings = check_for_ollama(path)
    assert findings.broken == []
    assert [line.split(": ")[1] for line in findings.odd] == ["tokenizer.chat_template"]  # it has none
    first = split(path, tmp_path, split_max_tensors=20)
    (line,) = check_for_ollama(first).broken
    assert line.startswith(f"{first}: split.count: expected one file, found ")


# ---- distances


def test_gemmas_template_is_the_one_that_checkpoints_have() -> None:
    assert json.loads((DEMO / "tokenizer_config.json").read_text())["chat_template"] == GEMMA


def distance(a: str, b: str) -> int:
    """Levenshtein's, by its definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))


@given(st.text("ab", max_size=5), st.text("abc", max_size=5), st.integers(1, 6))
def test_nearness(a: str, b: str, far: int) -> None:
    assert is_near(a, b, far) == (distance(a, b) < far)


def test_a_template_with_small_changes_is_still_gemmas() -> None:
    assert is_near(GEMMA.replace("'", '"'), GEMMA, FAR)
    assert is_near(GEMMA[: -(FAR - 1)], GEMMA, FAR)
    assert not is_near(GEMMA[:-FAR], GEMMA, FAR)
