from contextlib import suppress
from pathlib import Path

import griffins
import pytest
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType as V
from hypothesis import given
from hypothesis import strategies as st

from griffin_gguf.quant.file_types import Metadata
from griffin_gguf.quant.overrides import TensorTypes, override_keys, parse_pattern, read_patterns, tensor_type
from griffin_gguf.quant.recipes import Choices
from griffin_gguf.runtime.errors import FileFormatError, UnsupportedError

PATH = Path("model.gguf")
HP = griffins.tiny()
NAMES = [tensor.name for tensor in HP.tensors()]
KEYS = griffins.metadata(HP) | {
    "tokenizer.ggml.add_bos_token": (True, V.BOOL, None),
    "general.name": ("Tiny", V.STRING, None),
    "other.small": (-3, V.INT8, None),
    "other.array": ([1], V.ARRAY, V.UINT8),
}


def changed(*overrides: str) -> Metadata:
    found = override_keys(PATH, KEYS, overrides, NAMES)
    return {name: value for name, value in found.items() if KEYS.get(name) != value}


def test_the_first_pattern_that_fits_decides() -> None:
    patterns = ((r"ffn_down", T.Q6_K), (r"blk\.4\.ffn", T.IQ4_NL))
    found = TensorTypes(patterns).choices(HP).types
    assert found == {f"blk.{i}.ffn_down.weight": T.Q6_K for i in range(5)} | {
        "blk.4.ffn_up.weight": T.IQ4_NL,
        "blk.4.ffn_gate.weight": T.IQ4_NL,
    }


@pytest.mark.parametrize(
    ("untied", "types", "expected"),
    [
        (False, TensorTypes(output=T.Q4_K), {"token_embd.weight": T.Q4_K}),
        (False, TensorTypes(output=T.Q4_K, embedding=T.Q3_K), {"token_embd.weight": T.Q3_K}),
        (True, TensorTypes(output=T.Q4_K), {"output.weight": T.Q4_K}),
        (True, TensorTypes(output=T.Q4_K, embedding=T.Q3_K), {"output.weight": T.Q4_K, "token_embd.weight": T.Q3_K}),
        (False, TensorTypes((("embd", T.Q8_0),), embedding=T.Q3_K), {"token_embd.weight": T.Q3_K}),
        (False, TensorTypes((("embd", T.Q8_0),), output=T.Q3_K), {"token_embd.weight": T.Q8_0}),
        (True, TensorTypes((("^output", T.Q8_0),), output=T.Q3_K), {"output.weight": T.Q3_K}),
    ],
)
def test_head_and_embedding(untied: bool, types: TensorTypes, expected: dict[str, T]) -> None:
    assert types.choices(griffins.tiny(untied=untied)) == Choices(expected)


def test_a_pattern_may_hold_what_separates_it_from_its_type() -> None:
    assert parse_pattern("a=b=q4_k") == ("a=b", T.Q4_K)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ffn_up", "expected REGEX=TYPE"),
        ("=Q4_K", "expected REGEX=TYPE"),
        ("ffn[=Q4_K", "is no regular expression"),
        ("ffn=Q4_K_M", "'Q4_K_M' is no tensor type that can be written; choose one of BF16"),
        ("ffn=I32", "is no tensor type"),
        ("ffn=", "'' is no tensor type"),
    ],
)
def test_patterns_that_say_nothing(text: str, problem: str) -> None:
    with pytest.raises(UnsupportedError, match=problem):
        parse_pattern(text)


def test_a_file_of_patterns(tmp_path: Path) -> None:
    (tmp_path / "types.txt").write_text("\ufeff# first\n\n  ffn_up=q8_0  \nattn_.=IQ3_S\n", "utf-8")
    assert read_patterns(tmp_path / "types.txt") == [("ffn_up", T.Q8_0), ("attn_.", T.IQ3_S)]
    (tmp_path / "types.txt").write_text("ffn_up=q8_0\nattn")
    with pytest.raises(FileFormatError, match=r"types\.txt: line 2: --tensor-type attn: expected REGEX=TYPE"):
        read_patterns(tmp_path / "types.txt")
    with pytest.raises(FileFormatError, match=r"none\.txt: file: cannot be read"):
        read_patterns(tmp_path / "none.txt")


@given(st.text())
def test_any_text_is_a_type_or_one_line(text: str) -> None:
    for parse in (tensor_type, parse_pattern):
        with suppress(UnsupportedError):
            assert parse(text)


def test_keys_keep_their_types_and_new_ones_get_the_usual() -> None:
    assert changed(
        "recurrentgemma.context_length=int:4096",
        "recurrentgemma.rope.freq_base=float:500000",
        "tokenizer.ggml.add_bos_token=bool:false",
        "general.name=str:a: b=c",
        "other.small=int:-128",
        "new.int=int:7",
        "new.below=int:-7",
        "new.float=float:0.5",
        "new.flag=bool:true",
        "new.text=str:",
    ) == {
        "recurrentgemma.context_length": (4096, V.UINT32, None),
        "recurrentgemma.rope.freq_base": (500000.0, V.FLOAT32, None),
        "tokenizer.ggml.add_bos_token": (False, V.BOOL, None),
        "general.name": ("a: b=c", V.STRING, None),
        "other.small": (-128, V.INT8, None),
        "new.int": (7, V.UINT32, None),
        "new.below": (-7, V.INT64, None),
        "new.float": (0.5, V.FLOAT32, None),
        "new.flag": (True, V.BOOL, None),
        "new.text": ("", V.STRING, None),
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("general.name", "expected KEY=KIND:VALUE"),
        ("general.name=Tiny", "expected KEY=KIND:VALUE"),
        ("general.name=int:3", "the key's type is string"),
        ("other.small=int:128", "is outside of int8"),
        ("recurrentgemma.context_length=int:-1", "is outside of uint32"),
        ("recurrentgemma.context_length=float:4096", "the key's type is uint32"),
        ("other.array=int:1", "the key's type is array"),
        ("new=int:1.5", "'1.5' is no int"),
        ("new=bool:yes", "'yes' is no bool"),
        ("general.architecture=str:llama", "says how the file is made"),
        ("general.file_type=int:1", "says how the file is made"),
        ("griffin.recipe=str:x", "says how the file is made"),
        ("split.count=int:3", "says how the file is made"),
        ("general.type=str:imatrix", "says how the file is made"),
        ("a\tb=str:x", "printable text"),
        ("x" * 65536 + "=str:x", "printable text"),
        ("new=float:1e300", "is outside of float32"),
        ("new=str:\udcff", "is no str"),
    ],
)
def test_keys_that_cannot_be_set(text: str, problem: str) -> None:
    with pytest.raises(UnsupportedError, match=f"(?s)--override-kv .*{problem}"):
        changed(text)


def test_numbers_that_contradict_the_model() -> None:
    with pytest.raises(FileFormatError, match=r"model\.gguf: recurrentgemma\.ssm\.group_count"):
        changed("recurrentgemma.ssm.group_count=int:7")
    with pytest.raises(FileFormatError, match=r"rope\.freq_base: expected more than 0"):
        changed("recurrentgemma.rope.freq_base=float:nan")
    with pytest.raises(UnsupportedError, match="feed_forward_length=int:1024: the model's tensors have other shapes"):
        changed("recurrentgemma.feed_forward_length=int:1024")
