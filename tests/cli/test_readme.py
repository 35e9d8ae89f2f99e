"""README's examples, run as they stand: the demo model stands where the checkpoint's hub id points."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from command import done

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = [line for line in README.splitlines() if line.startswith("griffin ")]
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_examples_run_one_after_the_other(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, "google/recurrentgemma-2b-it")
    Path("my-text.txt").write_text("Some words of my own, and a few more of them.", encoding="utf-8")
    assert len(EXAMPLES) >= 7
    for line in EXAMPLES:
        _, name, *arguments = shlex.split(line)
        single = ("-t", "1") if name in ("chat", "generate", "report") else ()
        done(name, *arguments, *single, stdin="Hello.\n")
    assert {path.name for path in Path().iterdir()} == {
        "google", "models", "my-text.txt", "ollama-model", "report", "small.gguf"
    }  # fmt: skip

    (code,) = PYTHON
    exec(compile(code, "README.md", "exec"), {})
    position, size = map(int, capsys.readouterr().out.split())
    assert position > 0
    assert size > 0
