from dataclasses import replace
from math import prod
from pathlib import Path

import griffins
import llama_policy
import pytest
from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as T

from griffin_gguf.quant.file_types import ALWAYS_F32, FILE_TYPES, file_type
from griffin_gguf.quant.recipes import Choices, needs_importance, plan
from griffin_gguf.runtime.arch import Hyperparameters, Role
from griffin_gguf.runtime.errors import UnsupportedError

#: What llama-quantize's policy has no word for.
OURS = {Role.RECURRENT_GATE, Role.RECURRENT_LINEAR, Role.CONV, Role.VECTOR}


def layers(hp: Hyperparameters, name: str, suffix: str, type: T) -> set[int]:
    return {
        row.tensor.layer for row in plan(hp, file_type(name)) if row.tensor.name.endswith(suffix) and row.type is type
    }


@pytest.mark.parametrize(
    ("hp", "attn_v", "ffn_down"),
    [
        (griffins.TWO_B, {2, 11, 20, 23}, {0, 1, 2, 5, 8, 11, 14, 17, 20, 22, 23, 24, 25}),
        (griffins.NINE_B, {2, 11, 20, 29, 32, 35}, {*range(4), *range(6, 34, 3), *range(33, 38)}),
    ],
)
def test_layers_with_more_bits_in_the_published_models(
    hp: Hyperparameters, attn_v: set[int], ffn_down: set[int]
) -> None:
    for name in ("Q4_K_M", "Q5_K_M"):
        assert layers(hp, name, "attn_v.weight", T.Q6_K) == attn_v
        assert layers(hp, name, "ffn_down.weight", T.Q6_K) == ffn_down


#: Shapes that llama.cpp's policy is asked about.
SHAPES: dict[str, Hyperparameters] = {
    "2B": griffins.TWO_B,
    "9B": griffins.NINE_B,
    "untied": replace(griffins.TWO_B, untied=True),
    "groups of 4": replace(griffins.TWO_B, heads=12, kv_heads=3),
    "groups of 3": replace(griffins.TWO_B, heads=12, kv_heads=4),  # Q2_K gives attn_v less
    "attention only": replace(griffins.TWO_B, recurrent=(False,) * 26),
    "alternating": replace(griffins.NINE_B, recurrent=(False, True) * 19),
    "tiny": griffins.tiny(),
    "32": griffins.tiny(hidden=288, mlp_width=544),  # K-quants fit nowhere, blocks of 32 do
    "odd": griffins.tiny(hidden=272, mlp_width=520, untied=True),  # neither do
}


@pytest.mark.parametrize("name", [name for name, recipe in FILE_TYPES.items() if recipe.quantized])
@pytest.mark.parametrize("shape", SHAPES)
def test_everything_but_the_recurrence_is_as_llama_quantize_has_it(shape: str, name: str, tmp_path: Path) -> None:
    hp, recipe = SHAPES[shape], file_type(name)
    for imatrix in (False, True):
        ours = {row.tensor.name: row for row in plan(hp, recipe, imatrix=imatrix) if row.tensor.role not in OURS}
        tensors = [(row.tensor.name, row.tensor.shape) for row in ours.values()]
        theirs = (
            llama_policy.types_with_imatrix(tmp_path, hp, recipe.id, tensors)
            if imatrix
            else llama_policy.types(hp, recipe.id, tensors)
        )
        assert len(ours) > 3
        assert {name: row.type for name, row in ours.items()} == theirs


@pytest.mark.parametrize("name", [name for name, recipe in FILE_TYPES.items() if recipe.quantized])
def test_what_llama_quantize_refuses_without_an_importance_matrix(name: str, tmp_path: Path) -> None:
    """The quantizer itself says so in a dry run, by its last warning."""
    recipe = file_type(name)
    rows = [row for row in plan(griffins.TWO_B, recipe) if row.tensor.role not in OURS]
    refused = llama_policy.requires_imatrix(
        tmp_path, griffins.TWO_B, recipe.id, [(row.tensor.name, row.tensor.shape) for row in rows]
    )
    assert any(needs_importance(row, recipe) for row in rows) == refused == recipe.needs_importance


@pytest.mark.parametrize("recipe", FILE_TYPES.values(), ids=lambda recipe: recipe.name)
def test_the_recurrence(recipe) -> None:
    for row in plan(griffins.TWO_B, recipe):
        if row.tensor.role in ALWAYS_F32:
            assert row.type is T.F32
            assert row.tensor.spec.role is Role.CONV or len(row.tensor.shape) == 1
        if row.tensor.role is Role.RECURRENT_GATE:
            assert row.type is (T.Q8_0 if recipe.quantized else recipe.default)
        if row.tensor.role is Role.RECURRENT_LINEAR:
            assert row.type is (T.Q3_K if recipe.name == "Q2_K" else recipe.default)


@pytest.mark.parametrize("recipe", FILE_TYPES.values(), ids=lambda recipe: recipe.name)
def test_sizes_and_order(recipe) -> None:
    planned = plan(griffins.TWO_B, recipe)
    assert [row.tensor for row in planned] == list(griffins.TWO_B.tensors())
    for row in planned:
        block, size = GGML_QUANT_SIZES[row.type]
        assert row.nbytes * block == prod(row.tensor.shape) * size
        assert row.rows * row.columns == prod(row.tensor.shape)
        assert not row.note


def test_a_row_that_blocks_do_not_divide_falls_back_and_says_so() -> None:
    hp = griffins.tiny(hidden=288, mlp_width=520)
    rows = {row.tensor.name: row for row in plan(hp, file_type("Q4_K_M"))}
    assert rows["blk.1.ffn_up.weight"].type is T.Q5_0
    assert rows["blk.1.ffn_up.weight"].note == "Q5_0 instead of Q4_K, whose blocks of 256 do not divide rows of 288"
    assert rows["token_embd.weight"].type is T.Q8_0
    assert rows["blk.1.ffn_down.weight"].type is T.F16
    assert rows["blk.1.ssm_gate_i.weight"].note == ""
    types = {name: {row.tensor.name: row.type for row in plan(hp, file_type(name))} for name in FILE_TYPES}
    assert types["Q5_K_M"]["blk.1.ffn_up.weight"] is T.Q5_1
    assert types["Q2_K"]["blk.1.ffn_up.weight"] is T.Q4_0
    assert types["Q8_0"]["blk.1.ffn_down.weight"] is T.F16


def test_names() -> None:
    assert file_type("q4_k_m") is FILE_TYPES["Q4_K_M"]
    with pytest.raises(UnsupportedError, match=r"'Q4_K_L' is no file type; choose one of F32, .*Q2_K"):
        file_type("Q4_K_L")
    with pytest.raises(UnsupportedError, match=r"'mxfp4' is llama\.cpp's type for experts"):
        file_type("mxfp4")


def test_ids_are_those_of_llama_cpp() -> None:
    for name, recipe in FILE_TYPES.items():
        assert LlamaFileType(recipe.id).name in (f"MOSTLY_{name}", f"ALL_{name}")
        assert recipe.metadata["general.file_type"][0] == recipe.id


def test_choices_come_before_the_recipe() -> None:
    hp, q4 = griffins.tiny(), file_type("Q4_K_M")
    chosen = {"blk.1.ffn_up.weight": T.IQ3_S, "token_embd.weight": T.Q3_K}
    rows = {row.tensor.name: row for row in plan(hp, q4, Choices(chosen))}
    assert {name: rows[name].type for name in chosen} == chosen
    assert {n: r.type for n, r in rows.items() if n not in chosen} == {
        row.tensor.name: row.type for row in plan(hp, q4) if row.tensor.name not in chosen
    }
    pure = {row.tensor.role: row.type for row in plan(hp, q4, Choices(pure=True))}
    assert {type for role, type in pure.items() if role not in ALWAYS_F32} == {T.Q4_K}
    assert {pure[role] for role in ALWAYS_F32} == {T.F32}
