"""The demo model as GGUF, made once by the command itself."""

from pathlib import Path

import pytest
from command import done
from gguf import TokenType
from rewriting import rewritten

import griffin_gguf.cli
from griffin_gguf.runtime.gguf_file import GgufFile

CHECKPOINT = Path(griffin_gguf.cli.__file__).with_name("demo_model")


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    return CHECKPOINT


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with demo_model-{BF16,Q8_0,Q2_K}.gguf."""
    folder = tmp_path_factory.mktemp("models")
    done("convert", CHECKPOINT, "-o", folder, "--type", "BF16", "--type", "q8_0", "--type", "Q2_K")
    return folder


@pytest.fixture(scope="session")
def model(models: Path) -> Path:
    return models / "demo_model-Q8_0.gguf"


@pytest.fixture(scope="session")
def plain_model(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a chat template."""
    target = tmp_path_factory.mktemp("plain") / "plain.gguf"
    return rewritten(models / "demo_model-Q8_0.gguf", target, tokenizer__chat_template=None)


@pytest.fixture(scope="session")
def endless_model(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but no token that it knows ends an answer."""
    source = models / "demo_model-Q8_0.gguf"
    with GgufFile.open(source) as file:
        tokens = file.metadata["tokenizer.ggml.tokens"]
        types = list(file.metadata["tokenizer.ggml.token_type"])
    types[tokens.index("<end_of_turn>")] = int(TokenType.NORMAL)
    target = tmp_path_factory.mktemp("endless") / "endless.gguf"
    unused = tokens.index("<unused0>")
    return rewritten(
        source,
        target,
        tokenizer__ggml__eos_token_id=unused,
        tokenizer__ggml__eot_token_id=unused,
        tokenizer__ggml__token_type=types,
    )
