"""The repository keeps its promises: layers, README's commands, the folders that the documents name."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main

from griffin_gguf.cli import __version__
from griffin_gguf.cli.main import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/gguf-format.md")
PARTS = ("convert", "quant", "runtime", "cli")


def shell_lines(text: str) -> list[list[str]]:
    """The commands of a document's sh blocks, split as a shell splits them."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.strip()]


def test_imports_run_one_way() -> None:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "1 kept, 0 broken" in found.stdout


def test_the_first_commands_of_the_readme_are_the_scripts() -> None:
    assert shell_lines(README)[:2] == [["scripts/demo"], ["scripts/test"]]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_scripts_that_documents_name_are_there_and_executable(name: str) -> None:
    named = {
        line[0] for line in shell_lines((ROOT / name).read_text(encoding="utf-8")) if line[0].startswith("scripts/")
    }
    assert named
    for script in named:
        assert (ROOT / script).stat().st_mode & 0o111, script


def test_commands_in_the_readme_are_real() -> None:
    group: Any = typer.main.get_command(app)
    used = [line for line in shell_lines(README) if line[0] == "griffin"]
    assert {line[1] for line in used} >= {
        "convert",
        "quantize",
        "inspect",
        "generate",
        "chat",
        "report",
        "export-ollama",
    }
    for _, name, *arguments in used:
        context = group.commands[name].make_context(name, list(arguments))  # parses; raises for what it does not know
        assert context.params


def test_ci_runs_the_script_that_people_run() -> None:
    assert (ROOT / ".ci/run").read_text(encoding="utf-8").rstrip().endswith('/../scripts/test"')


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_files_that_documents_name_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    folders = "convert|quant|runtime|cli|tests|docs|scripts|tools|benchmarks"
    paths = re.findall(rf"`((?:{folders})/[\w./-]*)`", text)
    assert all((ROOT / name).parent.joinpath(link).exists() for link in links), links
    assert all((ROOT / path).exists() for path in paths), paths


@pytest.mark.parametrize("part", PARTS)
def test_each_part_is_linked_typed_and_in_the_wheel(part: str) -> None:
    assert (ROOT / ".dev/griffin_gguf" / part).resolve() == ROOT / part
    assert (ROOT / part / "py.typed").is_file()
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"][
        "wheel"
    ]
    assert part in wheel["only-include"]
    assert wheel["sources"][part] == f"griffin_gguf/{part}"


def test_every_module_has_its_line_in_the_architecture() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for part in PARTS:
        for module in (ROOT / part).rglob("*.py"):
            name = module.relative_to(ROOT).as_posix()
            assert module.name in ("__init__.py", "__main__.py") or f"`{name}`" in text, f"{name} is not explained"


def test_the_changelog_knows_this_version() -> None:
    assert f"\n## {__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
