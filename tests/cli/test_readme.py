"""README's examples, run as they stand: the demo model stands where the checkpoint's hub id points."""

import json
import re
import shlex
import shutil
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from command import done
from safetensors.numpy import save_file
from serving import serving

from griffin_gguf.runtime import places
from griffin_gguf.runtime.tuning import VARIABLE

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = [line for line in README.splitlines() if line.startswith("griffin ")]
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def write_adapter(folder: Path) -> None:
    """A LoRA adapter of one matrix of the demo model, as PEFT saves it."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefix, rng = "base_model.model.model.layers.0.mlp_block.up_proj.lora_", np.random.default_rng(0)
    factors = {"A": rng.standard_normal((2, 256)), "B": rng.standard_normal((512, 2))}
    tensors = {f"{prefix}{name}.weight": (0.01 * values).astype(np.float32) for name, values in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


def test_the_examples_run_one_after_the_other(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "tuning.json"))
    shutil.copytree(checkpoint, "google/recurrentgemma-2b-it")
    text = (checkpoint / "heldout.txt").read_text(encoding="utf-8")
    Path("my-text.txt").write_text(text[8000:14000], encoding="utf-8")
    Path("calibration.txt").write_text(text[:8000], encoding="utf-8")
    Path("notes.txt").write_text(text[:2000], encoding="utf-8")
    monkeypatch.setenv(places.VARIABLE, str(tmp_path / "data"))
    write_adapter(Path("my-adapter"))
    assert len(EXAMPLES) >= 7
    for line in EXAMPLES:
        _, name, *arguments = shlex.split(line)
        if name == "serve":  # goes on until it is told to end
            with serving(*arguments) as url, urlopen(url) as answer:
                assert answer.read() == b"Ollama is running"
            continue
        single = ("-t", "1") if name in ("chat", "generate", "read", "report", "imatrix", "quantize") else ()
        done(name, *arguments, *single, stdin="Hello.\n")
    assert {path.name for path in Path().iterdir()} == {
        "best.gguf", "calibration.txt", "data", "google", "imatrix.gguf", "mine.gguf", "models", "my-adapter",
        "my-text.txt", "notes.txt", "ollama-model", "report", "small.gguf", "tuning.json",
    }  # fmt: skip

    (code,) = PYTHON
    exec(compile(code, "README.md", "exec"), {})
    position, size = map(int, capsys.readouterr().out.split())
    assert position > 0
    assert size > 0
