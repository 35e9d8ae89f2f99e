from pathlib import Path
from typing import Any

import pytest
import tiny_griffins
import vocabularies


@pytest.fixture(scope="session")
def tokenizer() -> dict[str, Any]:
    return vocabularies.metadata_of(vocabularies.train())


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory, tokenizer: dict[str, Any]) -> dict[str, Path]:
    """By type, BF16 and Q4_K_M of the same weights; and "other", a model of other shapes."""
    folder = tmp_path_factory.mktemp("tiny")
    found = {
        type: tiny_griffins.write_tiny(folder / f"tiny-{type}.gguf", type, tokenizer) for type in ("BF16", "Q4_K_M")
    }
    other = tiny_griffins.write_tiny(folder / "other-Q8_0.gguf", "Q8_0", tokenizer, mlp_width=768)
    return found | {"other": other}
