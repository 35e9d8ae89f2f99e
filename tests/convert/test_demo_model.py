import importlib
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from safetensors import safe_open

FOLDER = Path(__file__).resolve().parents[2] / "cli" / "demo_model"
PAD, EOS, BOS, UNK = 0, 1, 2, 3
BLOCKS, BLOCK = 8, 512


@pytest.fixture(scope="module")
def tokenizer():
    return sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "tokenizer.model"))


@pytest.fixture(scope="module")
def held_out():
    return (FOLDER / "heldout.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def loaded():
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, output_loading_info=True)


def test_transformers_uses_every_tensor_and_misses_none(loaded):
    model, information = loaded
    assert isinstance(model, transformers.RecurrentGemmaForCausalLM)
    assert not any(information.values())


def test_tensors_are_bf16_with_rows_of_whole_superblocks():
    parameters = 0
    with safe_open(FOLDER / "model.safetensors", "np") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - a safetensors handle is no mapping
            part = tensors.get_slice(name)
            shape = part.get_shape()
            parameters += int(np.prod(shape))
            assert part.get_dtype() == "BF16", name
            if len(shape) > 1 and "conv_1d" not in name:
                assert shape[-1] % 256 == 0, name
    assert 5_000_000 < parameters < 8_500_000


def test_config_has_the_griffin_pattern(loaded):
    config = loaded[0].config
    assert config.block_types == ["recurrent", "recurrent", "attention"]
    assert (config.vocab_size, config.attention_window_size, config.logits_soft_cap) == (2560, 256, 30.0)
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    assert loaded[0].generation_config.eos_token_id == [1, 107]


def test_special_ids_and_types_are_gemmas(tokenizer):
    pieces = [tokenizer.id_to_piece(i) for i in range(109)]
    assert pieces[:7] == ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]"]
    assert pieces[7:106] == [f"<unused{i}>" for i in range(99)]
    assert pieces[106:] == ["<start_of_turn>", "<end_of_turn>", "\n"]
    assert [i for i in range(109) if tokenizer.is_control(i)] == [PAD, EOS, BOS]
    assert tokenizer.is_unknown(UNK)
    assert (tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.bos_id(), tokenizer.unk_id()) == (PAD, EOS, BOS, UNK)
    assert sum(tokenizer.is_byte(i) for i in range(tokenizer.vocab_size())) == 256


def test_held_out_text_survives_the_tokenizer(tokenizer, held_out):
    ids = tokenizer.encode(held_out)
    assert UNK not in ids
    assert tokenizer.decode(ids) == held_out
    assert 150_000 < len(held_out.encode()) < 300_000


def test_text_outside_the_vocabulary_survives_the_tokenizer(tokenizer):
    text = "  two  spaces,\n\n\n\n\nfive lines, 2047 and \N{SNOWMAN}\ttoo "
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template_writes_gemmas_turns(tokenizer):
    fast = transformers.AutoTokenizer.from_pretrained(FOLDER)
    messages = [{"role": "user", "content": " What is a cynic? "}]
    written = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    turns = "<start_of_turn>user\nWhat is a cynic?<end_of_turn>\n<start_of_turn>model\n"
    assert written == "<bos>" + turns
    assert fast(turns).input_ids == [BOS, *tokenizer.encode(turns)]


def test_folder_is_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 20_000_000


def test_model_has_learned(loaded, tokenizer, held_out):
    """Under a fifth of the perplexity of the best model that knows token counts alone."""
    tokens = np.array(tokenizer.encode(held_out))
    frequency = np.bincount(tokens) / len(tokens)
    blocks = tokens[: BLOCKS * BLOCK].reshape(BLOCKS, BLOCK)
    unigram = np.exp(-np.log(frequency[blocks]).mean())

    targets = torch.from_numpy(blocks)
    inputs = torch.nn.functional.pad(targets[:, :-1], (1, 0), value=BOS)
    with torch.no_grad():
        logits = loaded[0](inputs, use_cache=False).logits
    model = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).exp().item()
    assert model < unigram / 5


@pytest.fixture
def trainer(monkeypatch):
    """The model that `tools/train_demo.py` trains."""
    monkeypatch.syspath_prepend(FOLDER.parents[1] / "tools")
    return importlib.import_module("griffin_torch")


def test_the_trained_equations_are_transformers_ones(trainer, loaded):
    torch.manual_seed(0)
    model = trainer.Griffin(trainer.Shape(vocabulary=2560)).eval()
    missing, unexpected = model.load_state_dict(loaded[0].state_dict(), strict=False)
    assert (missing, unexpected) == ([], ["lm_head.weight"])
    tokens = torch.randint(0, 2560, (2, 320))  # longer than the window
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), loaded[0](tokens, use_cache=False).logits, atol=1e-4, rtol=0)


def test_the_parallel_scan_has_the_recurrences_values_and_gradients(trainer):
    torch.manual_seed(0)
    a = torch.rand(2, 3 * trainer.CHUNK, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn_like(a, requires_grad=True)
    h, expected = torch.zeros_like(a[:, 0]), []
    for t in range(a.shape[1]):
        h = a[:, t] * h + x[:, t]
        expected.append(h)
    torch.testing.assert_close(trainer.Scan.apply(a, x), torch.stack(expected, 1))
    assert torch.autograd.gradcheck(trainer.Scan.apply, (a, x))
