"""Adapters merged at conversion, against PEFT's own merge of what PEFT itself saved."""

import json
import os
import re
import shutil
import tracemalloc
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from checkpoints import random_checkpoint, write_safetensors
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.numpy import load_file
from transformers import RecurrentGemmaForCausalLM

from griffin_gguf.convert.adapter_config import IGNORED, UNSUPPORTED, USED, read_adapter_config
from griffin_gguf.convert.checkpoint import Checkpoint
from griffin_gguf.convert.config import read_config
from griffin_gguf.convert.lora import EMBEDDING, HEAD, WEIGHTS, Adapter, Weights, open_config
from griffin_gguf.convert.pipeline import convert
from griffin_gguf.runtime.errors import GriffinError
from griffin_gguf.runtime.gguf_file import GgufFile, dequantize
from griffin_gguf.runtime.model import load

CONFIG = "adapter_config.json"
LAYER = "base_model.model.model.layers.0."
UP = LAYER + "mlp_block.up_proj."
F32 = np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("tied") / "c", dtype="f32", attention_bias=True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untied") / "c"
    return random_checkpoint(folder, dtype="f32", lm_head="different", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def plain(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for up_proj alone."""
    return trained(tied, tmp_path_factory.mktemp("plain") / "plain", target_modules=["up_proj"])


def base(checkpoint: Path) -> Any:
    return RecurrentGemmaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def trained(checkpoint: Path, folder: Path, seed: int = 0, **config: Any) -> Path:
    """An adapter that PEFT saved, every number that can be trained moved at random."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6} | config
    model = quietly(lambda: peft.get_peft_model(base(checkpoint), peft.LoraConfig(**settings)))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=random))
    quietly(lambda: model.save_pretrained(folder))
    return folder


def quietly(act: Callable[[], Any]) -> Any:
    """PEFT and transformers warn of tied weights and of their own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return act()


def merged_by_peft(checkpoint: Path, adapters: list[Path], folder: Path) -> Path:
    """A checkpoint with the adapters merged; its head, as PEFT advises where it was tied, cloned before."""
    model = base(checkpoint)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    for adapter in adapters:
        model = quietly(
            lambda model=model, path=adapter: peft.PeftModel.from_pretrained(model, path).merge_and_unload()
        )
    model.save_pretrained(folder)
    for file in checkpoint.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def tensors_of(path: Path) -> dict[str, F32]:
    with GgufFile.open(path) as file:
        return {n: dequantize(info, file.data(n)).reshape(info.shape).copy() for n, info in file.tensors.items()}


def converted(checkpoint: Path, target: Path, *adapters: Path) -> dict[str, F32]:
    convert(checkpoint, [(target, "F32")], loras=adapters, threads=1)
    return tensors_of(target)


def check_same(found: dict[str, F32], expected: dict[str, F32]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-5 * float(abs(value).max()), err_msg=name)


# ---- what comes out

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "linear_x", "linear_y", "linear_out", "gate_proj", "up_proj",
          "down_proj"]  # fmt: skip
ALL_LINEAR = r"(attn_[qkv]|attn_output|ssm_[xy]|ssm_out|ffn_gate|ffn_up|ffn_down)\.weight"
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp_block\.up_proj": 7, "^model.layers.[02].*down_proj": 1},
    "alpha_pattern": {"linear_(x|y)": 11, "model.layers.2.temporal_block.o_proj": 0.5, "proj": 1000, "down_proj": 3},
}

#: An adapter's config -> the GGUF's tensors that it changes.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "every linear layer": ({"target_modules": LINEAR}, ALL_LINEAR),
    "rank-stabilized": ({"target_modules": LINEAR, "use_rslora": True, "r": 3}, ALL_LINEAR),
    "patterns": ({"target_modules": LINEAR, **PATTERNS}, ALL_LINEAR),
    "rank-stabilized patterns": ({"target_modules": LINEAR, "use_rslora": True, **PATTERNS}, ALL_LINEAR),
    "DoRA": ({"target_modules": LINEAR, "use_dora": True}, ALL_LINEAR),
    "all biases": ({"target_modules": ["up_proj"], "bias": "all"}, r"ffn_up.weight|(?<!gate_[ir])\.bias"),
    "LoRA's biases": ({"target_modules": ["up_proj"], "bias": "lora_only"}, "ffn_up"),
    "biases of LoRA": ({"target_modules": ["linear_x"], "lora_bias": True}, "ssm_x"),
    "whole modules": (
        {"target_modules": ["q_proj"],
         "modules_to_save": ["temporal_pre_norm", "final_norm", "rg_lru", "conv_1d", "0.mlp_block.down_proj"]},
        r"attn_q\.weight|attn_norm|output_norm|ssm_gate|ssm_a|ssm_conv1d|blk\.0\.ffn_down"),
    "the embedding": ({"target_modules": ["embed_tokens"], "r": 5}, "token_embd"),
    "the head": ({"target_modules": ["lm_head"]}, r"^output\.weight"),
    "embedding and head": (
        {"target_modules": ["embed_tokens", "lm_head", "k_proj"]}, r"token_embd|^output\.weight|attn_k\.weight"),
    "DoRA of embedding and head": (
        {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}, r"token_embd|^output\.weight"),
    "a new embedding": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, r"attn_q\.weight|token_embd"),
    "a new head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, r"attn_q\.weight|^output\.weight"),
    "both new": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        r"attn_q\.weight|^output\.weight|token_embd"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_as_peft_merges_it(tmp_path: Path, tied: Path, untied: Path, case, kind):
    config, touched = CASES[case]
    checkpoint = tied if kind == "tied" else untied
    adapter = trained(checkpoint, tmp_path / "adapter", **config)
    found = converted(checkpoint, tmp_path / "ours.gguf", adapter)
    expected = converted(merged_by_peft(checkpoint, [adapter], tmp_path / "merged"), tmp_path / "theirs.gguf")
    check_same(found, expected)
    before = converted(checkpoint, tmp_path / "base.gguf")
    before.setdefault("output.weight", before["token_embd.weight"])
    changed = {name for name, value in found.items() if not np.array_equal(value, before[name])}
    assert changed == {name for name in found if re.search(touched, name)}
    assert ("output.weight" in found) == (kind == "untied" or bool(re.search(r"token|\^output", touched)))


@pytest.mark.parametrize("config", [
    {"target_modules": ["embed_tokens", "up_proj"]},
    {"target_modules": ["lm_head", "up_proj"]},
    {"target_modules": ["embed_tokens"], "use_dora": True},
    {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": ["up_proj"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["up_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
], ids=str)  # fmt: skip
def test_a_tied_model_answers_as_the_adapter_was_trained(tmp_path: Path, tied: Path, config):
    """Not as PEFT merges in place, which adds to the one tensor what was trained for one of its two uses."""
    adapter = trained(tied, tmp_path / "adapter", **config)
    tokens = np.arange(5, 35)
    model = quietly(lambda: peft.PeftModel.from_pretrained(base(tied), adapter))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)[None], use_cache=False).logits[0].numpy()
    found = converted(tied, tmp_path / "m.gguf", adapter)
    with load(tmp_path / "m.gguf", backend="numpy") as ours:
        logits = ours.forward(tokens, ours.new_state(), every=True)
    np.testing.assert_allclose(logits, expected, atol=2e-3)
    assert ("output.weight" in found) == ("ensure_weight_tying" not in config)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_a_checkpoint_and_an_adapter_of_16_bits_are_merged_in_float32(tmp_path: Path, dtype):
    checkpoint = random_checkpoint(tmp_path / "c", dtype=dtype)
    adapter = trained(checkpoint, tmp_path / "adapter", target_modules=[*LINEAR, "embed_tokens"])
    write_safetensors(adapter / WEIGHTS, load_file(adapter / WEIGHTS), dtype)
    found = converted(checkpoint, tmp_path / "ours.gguf", adapter)
    check_same(found, converted(merged_by_peft(checkpoint, [adapter], tmp_path / "m"), tmp_path / "theirs.gguf"))


def test_several_adapters_are_merged_one_after_the_other(tmp_path: Path, tied: Path):
    one = trained(tied, tmp_path / "one", target_modules=["up_proj", "embed_tokens"], bias="lora_only")
    two = trained(tied, tmp_path / "zwei", 1, target_modules=["up_proj", "q_proj", "embed_tokens"], use_dora=True)
    found = converted(tied, tmp_path / "ours.gguf", one, two)
    # `base_layer.weight` of the second is the base's embedding: to PEFT, merging in turn, it would undo the first.
    tensors = load_file(two / WEIGHTS)
    del tensors["base_model.model.model.embed_tokens.base_layer.weight"]
    write_safetensors(two / WEIGHTS, tensors, "f32")
    check_same(found, converted(merged_by_peft(tied, [one, two], tmp_path / "m"), tmp_path / "theirs.gguf"))
    with GgufFile.open(tmp_path / "ours.gguf") as file:
        assert file.metadata["griffin.lora"] == ["one", "zwei"]
        assert file.metadata["general.name"] == "c"


def test_without_adapters_the_key_is_absent(tmp_path: Path, tied: Path):
    converted(tied, tmp_path / "m.gguf")
    with GgufFile.open(tmp_path / "m.gguf") as file:
        assert "griffin.lora" not in file.metadata


def test_names_that_hold_the_adapters_name(tmp_path: Path, tied: Path):
    adapter = trained(tied, tmp_path / "a", target_modules=["up_proj", "embed_tokens"], use_dora=True,
                      modules_to_save=["final_norm"])  # fmt: skip
    expected = converted(tied, tmp_path / "m.gguf", adapter)
    renamed = {}
    for name, value in load_file(adapter / WEIGHTS).items():
        for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
            name = name.replace(f".{part}", f".{part}.default")
        renamed[name.replace("final_norm.", "final_norm.modules_to_save.default.")] = value
    write_safetensors(adapter / WEIGHTS, renamed, "f32")
    check_same(converted(tied, tmp_path / "m.gguf", adapter), expected)


def test_threads_and_types_change_no_byte(tmp_path: Path, tied: Path):
    adapter = trained(tied, tmp_path / "a", target_modules=[*LINEAR, "embed_tokens"], use_dora=True)
    for threads in (1, 3):
        targets = [(tmp_path / f"{threads}-{kind}.gguf", kind) for kind in ("F32", "Q8_0")]
        convert(tied, targets, loras=[adapter], threads=threads)
    convert(tied, [(tmp_path / "alone.gguf", "Q8_0")], loras=[adapter], threads=2)
    assert (tmp_path / "1-F32.gguf").read_bytes() == (tmp_path / "3-F32.gguf").read_bytes()
    assert (tmp_path / "1-Q8_0.gguf").read_bytes() == (tmp_path / "3-Q8_0.gguf").read_bytes()
    assert (tmp_path / "1-Q8_0.gguf").read_bytes() == (tmp_path / "alone.gguf").read_bytes()


# ---- how it is read

VOCABULARY, HIDDEN, RANK = 3001, 256, 8


@cache
def large(folder: Path) -> tuple[Checkpoint, Adapter]:
    """A checkpoint that is an embedding and one layer's up_proj, an adapter to both."""
    random_checkpoint(folder / "c")
    config = json.loads((folder / "c" / "config.json").read_text())
    config |= {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 2 * 401}
    (folder / "c" / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    up = "model.layers.0.mlp_block.up_proj"
    random = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    write_safetensors(
        folder / "c" / "model.safetensors", {EMBEDDING: random(VOCABULARY, HIDDEN), f"{up}.weight": random(401, HIDDEN)}
    )
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 8}))
    write_safetensors(folder / WEIGHTS, {
        "base_model.model.model.embed_tokens.lora_embedding_A": random(RANK, VOCABULARY),
        "base_model.model.model.embed_tokens.lora_embedding_B": random(HIDDEN, RANK),
        f"base_model.model.{up}.lora_A.weight": random(RANK, HIDDEN),
        f"base_model.model.{up}.lora_B.weight": random(401, RANK),
    }, "f32")  # fmt: skip
    hp = replace(read_config(folder / "c" / "config.json").hp, untied=True)
    return Checkpoint(folder / "c"), Adapter(open_config(folder), {tensor.source: tensor for tensor in hp.tensors()})


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    stored, adapter = large(tmp_path_factory.mktemp("large"))
    return Weights(stored, [adapter], tied=True, shared=True)


SOURCES = {EMBEDDING: VOCABULARY, "model.layers.0.mlp_block.up_proj.weight": 401}


@given(st.data())
def test_any_rows_are_those_of_the_whole_to_the_bit(weights: Weights, data):
    source = data.draw(st.sampled_from(sorted(SOURCES)))
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, SOURCES[source])] * 2)))
    rows = weights.rows(source)
    found = rows(start, stop)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, rows(0, SOURCES[source])[start:stop])


def test_threads_read_at_once(weights: Weights):
    pieces = [(source, at, min(at + 37, n)) for source, n in SOURCES.items() for at in range(0, n, 37)]
    alone = [weights.rows(source)(start, stop) for source, start, stop in pieces]
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda piece: weights.rows(piece[0])(piece[1], piece[2]), pieces)
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one, other)


def test_memory_is_that_of_a_piece(weights: Weights):
    rows = weights.rows(EMBEDDING)
    tracemalloc.start()
    for start in range(0, VOCABULARY - 50, 50):
        rows(start, start + 50)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 50 * HIDDEN * 4 + 4 * RANK * HIDDEN * 4  # the whole is 60 pieces


def test_a_factor_is_read_once_for_all_pieces(tmp_path: Path, monkeypatch):
    stored, adapter = large(tmp_path)
    elements: dict[str, int] = {}

    def count(method: str) -> None:
        real = getattr(Checkpoint, method)

        def counted(self: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> F32:
            found = real(self, name, start, stop)
            elements[name] = elements.get(name, 0) + found.size
            return found

        monkeypatch.setattr(Checkpoint, method, counted)

    count("read")
    count("read_columns")
    weights = Weights(stored, [adapter], tied=False, shared=False)
    for source, n in SOURCES.items():
        for start in range(0, n, 16):
            weights.rows(source)(start, min(start + 16, n))
    assert elements == {name: t.rows * t.columns for s in (stored, adapter.stored) for name, t in s.tensors.items()}


# ---- what does not

Change = Callable[[dict[str, Any], dict[str, Any]], object]


def changed(adapter: Path, folder: Path, change: Change) -> Path:
    """A copy of an adapter with other fields and tensors."""
    shutil.copytree(adapter, folder)
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    change(config, tensors)
    (folder / CONFIG).write_text(json.dumps(config))
    write_safetensors(folder / WEIGHTS, tensors, "f32")
    return folder


def fields(**values: Any) -> Change:
    return lambda config, tensors: config.update(values)


def renamed(old: str, new: str) -> Change:
    return lambda config, tensors: tensors.update({new: tensors.pop(old)})


def added(name: str, *shape: int) -> Change:
    return lambda config, tensors: tensors.update({name: np.zeros(shape, np.float32)})


def number(name: str, value: float) -> Change:
    return lambda config, tensors: tensors[name].__setitem__((0, 0), value)


A, B, BIAS, NAN = f"{UP}lora_A.weight", f"{UP}lora_B.weight", f"{UP}lora_B.bias", float("nan")
BAD: dict[str, tuple[Change, str]] = {
    "another method": (fields(peft_type="LOHA"), rf"{CONFIG}: peft_type: only 'LORA' can be merged, found 'LOHA'"),
    "no method": (lambda c, t: c.pop("peft_type"), rf"{CONFIG}: peft_type: .* found None"),
    "an unknown field": (fields(use_magic=True), rf"{CONFIG}: use_magic: is a field that we do not know"),
    "no rank": (lambda c, t: c.pop("r"), rf"{CONFIG}: r: is missing"),
    "rank 0": (fields(r=0), rf"{CONFIG}: r: expected a rank from 1 to 4096, found 0"),
    "a huge rank": (fields(r=10**9), rf"{CONFIG}: r: expected a rank from 1 to 4096"),
    "a rank of text": (fields(r="8"), rf"{CONFIG}: r: expected a whole number, found '8'"),
    "another rank": (fields(r=5), rf"{A}: expected shape \(5, 64\) by {CONFIG}, found \(4, 64\)"),
    "no alpha": (fields(lora_alpha=None), rf"{CONFIG}: lora_alpha: is missing"),
    "alpha that is no number": (fields(lora_alpha=NAN), rf"{CONFIG}: lora_alpha: expected a finite number, found nan"),
    "fan_in_fan_out": (fields(fan_in_fan_out=True), rf"{CONFIG}: fan_in_fan_out: only false"),
    "a bias unheard of": (fields(bias="some"), rf"{CONFIG}: bias: expected one of none, all, lora_only, found 'some'"),
    "PiSSA": (fields(init_lora_weights="pissa_niter_4"), rf"{CONFIG}: init_lora_weights: 'pissa_niter_4' changes the"),
    "LoftQ": (fields(init_lora_weights="loftq"), rf"{CONFIG}: init_lora_weights: 'loftq' changes the base's weights"),
    "modules that are no list": (fields(modules_to_save="x"), rf"{CONFIG}: modules_to_save: expected a list"),
    "a pattern that is no object": (fields(rank_pattern=[1]), rf"{CONFIG}: rank_pattern: expected an object"),
    "a broken pattern": (fields(alpha_pattern={"a[": 1}), rf"{CONFIG}: alpha_pattern: 'a\[' is no pattern"),
    "a pattern without end": (fields(rank_pattern={"(.*.*)*x": 1}), rf"{CONFIG}: rank_pattern: .* too intricate"),
    "a rank of a pattern": (fields(rank_pattern={"x": -1}), rf"{CONFIG}: rank_pattern: expected a rank"),
    "DoRA without magnitudes": (fields(use_dora=True), rf"{B}: {CONFIG} says use_dora = true, and .* missing"),
    "magnitudes without DoRA": (added(f"{UP}lora_magnitude_vector", 96), "lora_magnitude_vector: .* use_dora = false"),
    "biases of LoRA that are not there": (fields(lora_bias=True), rf"{B}: {CONFIG} says lora_bias = true, .* missing"),
    "DoRA with biases of LoRA": (fields(lora_bias=True, use_dora=True), rf"{CONFIG}: use_dora: PEFT has none with lo"),
    "biases of LoRA not announced": (added(BIAS, 96), rf"{B}: {CONFIG} says lora_bias = false, .* there"),
    "no A": (lambda c, t: t.pop(A), rf"{B}: its other half, lora_A of .*up_proj, is missing"),
    "no B": (lambda c, t: t.pop(B), rf"{A}: its other half, lora_B of .*, is missing"),
    "a bias alone": (lambda c, t: (t.update({BIAS: t.pop(A)[0]}), t.pop(B)), rf"{BIAS}: its other half, lora_B"),
    "no tensors": (lambda c, t: t.clear(), rf"{WEIGHTS}: tensors: none of them fits"),
    "a layer too many": (
        lambda c, t: t.update({k.replace("layers.3", "layers.4"): v for k, v in t.items()}),
        r"layers\.4\.mlp_block\.up_proj\.lora_A\.weight: fits no tensor of this model"),
    "another model's module": (added("base_model.model.score.weight", 2, 64), r"score\.weight: fits no tensor"),
    "no prefix": (added("lm_head.weight", 384, 64), "lm_head.weight: fits no tensor of this model"),
    "a part unheard of": (added(f"{UP}lora_C.weight", 4, 4), r"lora_C\.weight: fits no tensor"),
    "an end unheard of": (added(f"{UP}lora_A.default.extra.weight", 4, 4), r"extra\.weight: fits no tensor"),
    "LoRA of gates": (
        added(f"{LAYER}temporal_block.rg_lru.lora_A.weight", 4, 64), r"rg_lru\.lora_A\.weight: fits no tensor"),
    "LoRA of the convolution": (
        added(f"{LAYER}temporal_block.conv_1d.lora_A.weight", 4, 1, 4), r"conv_1d\.lora_A\.weight: only LoRA of lin"),
    "LoRA of a norm": (added(f"{LAYER}temporal_pre_norm.lora_A.weight", 4, 64), r"pre_norm\.lora_A.*: only LoRA of"),
    "factors of a layer for the embedding": (
        added("base_model.model.model.embed_tokens.lora_A.weight", 4, 64), "expected lora_embedding_A and lora_"),
    "factors of the embedding for a layer": (
        added(f"{UP}lora_embedding_A", 4, 64), "lora_embedding_A: expected lora_A and lora_B for model.layers.0"),
    "A of another width": (added(A, 4, 65), rf"{A}: expected shape \(4, 64\) .*, found \(4, 65\)"),
    "B of another height": (added(B, 95, 4), rf"{B}: expected shape \(96, 4\) .*, found \(95, 4\)"),
    "a bias of another length": (
        added(f"{UP}base_layer.bias", 95), r"base_layer\.bias: expected shape \(96,\), found \(95,\)"),
    "an embedding of another vocabulary": (
        added("base_model.model.model.embed_tokens.weight", 385, 64), r"expected shape \(384, 64\), found \(385, 64\)"),
    "A twice": (
        lambda c, t: t.update({A.replace("A.w", "A.default.w"): t[A]}), "is the same to .*up_proj.weight as .*lora_A"),
    "two replacements": (
        lambda c, t: t.update({f"{UP}bias": np.zeros(96, "f4"), f"{UP}base_layer.bias": np.zeros(96, "f4")}),
        r"up_proj\.bias: replaces .*up_proj\.bias, as does .*base_layer\.bias"),
    "NaN in A": (number(A, NAN), rf"{WEIGHTS}: {A}: holds NaN or infinity"),
    "infinity in B": (number(B, float("inf")), rf"{WEIGHTS}: {B}: holds NaN or infinity"),
    "NaN in a norm": (
        lambda c, t: t.update({"base_model.model.model.final_norm.weight": np.full(64, NAN, np.float32)}),
        rf"{WEIGHTS}: base_model\.model\.model\.final_norm\.weight: holds NaN or infinity"),
    "a product past F16": (number(A, 1e8), r"model\.safetensors: .*up_proj.*F16 ends at 65504, with .*bad"),
    "a product past float32": (fields(lora_alpha=2**53), r"up_proj\.weight: holds "),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_adapter_is_one_line_and_no_file(tmp_path: Path, tied: Path, plain: Path, name):
    change, problem = BAD[name]
    adapter = changed(plain, tmp_path / "bad", change)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(GriffinError, match=problem) as error:
        convert(tied, [(out / "m.gguf", "F16")], loras=[adapter])
    assert "\n" not in str(error.value)
    assert str(adapter) in str(error.value)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_merged_is_refused_by_name(tmp_path: Path, tied: Path, plain: Path, name):
    adapter = changed(plain, tmp_path / "bad", fields(**{name: {"x": 1}}))
    with pytest.raises(GriffinError, match=rf"{CONFIG}: {name}: .* cannot be merged"):
        convert(tied, [(tmp_path / "m.gguf", "F16")], loras=[adapter], allow_unknown=True)
    for empty in (None, False, [], {}):
        (adapter / CONFIG).write_text(json.dumps(json.loads((plain / CONFIG).read_text()) | {name: empty}))
        read_adapter_config(adapter / CONFIG)


def test_every_field_that_peft_writes_has_its_table():
    written = set(peft.LoraConfig().to_dict())
    assert written <= USED | set(IGNORED) | set(UNSUPPORTED) | {"runtime_config"}
    assert not USED & set(IGNORED)
    assert not set(UNSUPPORTED) & (USED | set(IGNORED))


def test_allow_unknown_goes_past_fields_and_tensors(tmp_path: Path, tied: Path, plain: Path):
    expected = converted(tied, tmp_path / "m.gguf", plain)
    change = added("base_model.model.score.weight", 2, 64)
    adapter = changed(plain, tmp_path / "odd", lambda c, t: (change(c, t), c.update(use_magic=True)))
    convert(tied, [(tmp_path / "m.gguf", "F32")], loras=[adapter], allow_unknown=True)
    check_same(tensors_of(tmp_path / "m.gguf"), expected)


def test_a_folder_that_is_no_adapter(tmp_path: Path, tied: Path, plain: Path):
    def refusal(folder: Path) -> str:
        with pytest.raises(GriffinError) as error:
            convert(tied, [(tmp_path / "m.gguf", "F16")], loras=[folder])
        assert not (tmp_path / "m.gguf").exists()
        return str(error.value).removeprefix(str(folder))

    assert "expected a folder" in refusal(tmp_path / "nowhere")
    assert "expected a folder" in refusal(plain / CONFIG)
    assert refusal(tied).endswith(f"{CONFIG}: file: is missing")
    adapter = shutil.copytree(plain, tmp_path / "a")
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    assert "adapter_model.bin: is a pickle" in refusal(adapter)
    (adapter / "adapter_model.bin").unlink()
    assert refusal(adapter).endswith(f"{WEIGHTS}: file: is missing")
    (adapter / WEIGHTS).write_bytes((plain / WEIGHTS).read_bytes()[:-1])
    assert "cut short" in refusal(adapter)
    (adapter / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "Git LFS pointer" in refusal(adapter)


def test_adapters_that_contradict_each_other(tmp_path: Path, tied: Path):
    one, two = (trained(tied, tmp_path / f"{i}", i, target_modules=["up_proj"], bias="lora_only") for i in range(2))
    with pytest.raises(GriffinError, match=r"1/adapter_model.*base_layer\.bias: .*/0 replaces .*up_proj\.bias as well"):
        converted(tied, tmp_path / "m.gguf", one, two)
    converted(tied, tmp_path / "m.gguf", one, one)


def test_a_target_that_is_a_file_of_the_adapter_is_refused(tmp_path: Path, tied: Path, plain: Path):
    adapter = shutil.copytree(plain, tmp_path / "a")
    (tmp_path / "link.gguf").symlink_to(adapter / WEIGHTS)
    with pytest.raises(GriffinError, match="is a file of the adapter"):
        converted(tied, tmp_path / "link.gguf", adapter)
    assert (adapter / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()


def test_an_adapter_that_changes_while_it_is_read(tmp_path: Path, tied: Path, plain: Path):
    adapter = shutil.copytree(plain, tmp_path / "a")
    with pytest.raises(GriffinError, match=f"{WEIGHTS}: file: was changed"):
        convert(
            tied, [(tmp_path / "m.gguf", "F16")], loras=[adapter],
            progress=lambda done, total: os.utime(adapter / WEIGHTS, (0, 0)),
        )  # fmt: skip
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("key", [
    "q_proj", "proj", "layers.1.x.q_proj", r"layers\.\d+\.x\.q_proj", "^model.layers.1.x.q_proj", ".*q_proj",
    "(q|k)_proj", "x.(q|k)_proj", "_proj", "model", "1.x.q_proj", "a|q_proj", "q_proj$", "[qk]_pro.",
])  # fmt: skip
def test_patterns_match_as_in_peft(tmp_path: Path, key):
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "rank_pattern": {key: 2}}))
    config = read_adapter_config(tmp_path / CONFIG)
    for module in ("model.layers.1.x.q_proj", "model.layers.11.x.q_proj", "q_proj", "model.layers.1.x.k_proj", "model"):
        expected = 2 if get_pattern_key([key], module) == key else 1
        assert config.rank_of(module) == expected, module


def test_the_head_is_a_tensor_of_this_model():
    assert HEAD == "lm_head.weight"
