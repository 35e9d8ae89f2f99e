"""An Ollama Modelfile for a Griffin GGUF, as text.

Gemma's turns are the one conversation format that is translated: a file whose own Jinja template writes them
gets Ollama's Go template for them. Ollama puts BOS in front itself, as the file's `add_bos_token` asks.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from griffin_gguf.runtime.chat import ChatTemplate
from griffin_gguf.runtime.errors import FileFormatError, GriffinError
from griffin_gguf.runtime.sampling import Sampling

#: How things stand with Ollama itself.
TODAY = (
    "Ollama as released cannot load this architecture: its llama.cpp does not have RecurrentGemma, and `ollama create` "
    "refuses the file. `griffin llamacpp build` makes one that has; docs/ollama.md says how Ollama comes to run it. "
    "Or `griffin serve` speaks Ollama's API, and its clients work with that."
)

#: Gemma's turns. There is no system turn: system text goes in front of the next user's, as Gemma's makers advise.
GEMMA_TEMPLATE = """\
{{- $system := "" }}
{{- range .Messages }}
{{- if eq .Role "system" }}
{{- if $system }}{{ $system = printf "%s\\n\\n%s" $system .Content }}
{{- else }}{{ $system = .Content }}
{{- end }}
{{- else }}<start_of_turn>
{{- if eq .Role "assistant" }}model
{{- else }}user
{{- if $system }}
{{ $system }}
{{ $system = "" }}
{{- end }}
{{- end }}
{{ .Content }}<end_of_turn>
{{ end }}
{{- end }}<start_of_turn>model
"""

#: A model that was not trained to converse goes on from the text.
PLAIN_TEMPLATE = "{{ .Prompt }}"

GEMMA_STOPS = ("<start_of_turn>", "<end_of_turn>")

_QUOTES = '"""'

#: Keys under which a GGUF names its licence.
_LICENSE_KEYS = ("general.license", "general.license.name", "general.license.link")


@dataclass(frozen=True)
class Modelfile:
    """What stands in a Modelfile for the file named `gguf` beside it.

    `system` is the text that begins every conversation, `license` the licence or its name; `context` the number of
    tokens that Ollama keeps.
    """

    gguf: str
    template: str
    stops: tuple[str, ...]
    sampling: Sampling
    context: int
    system: str | None = None
    license: str | None = None

    def text(self) -> str:
        """The Modelfile. Raises `GriffinError` for what its format cannot hold."""
        if any(not c.isprintable() or c in "\"'" for c in self.gguf) or self.gguf != self.gguf.strip():
            raise GriffinError(f"{self.gguf}: file name: has characters that a Modelfile cannot hold; rename the file")
        if self.system and not re.search(r"\.(System|Messages)\b", self.template):
            raise GriffinError(
                "system: the template says nothing of system texts, so this one would go nowhere; "
                "give a template by --template FILE"
            )
        blocks = [f"FROM ./{self.gguf}", f"TEMPLATE {quoted('template', self.template)}"]
        blocks += [f"SYSTEM {quoted('system', self.system)}"] if self.system else []
        blocks += ["\n".join([f'PARAMETER stop "{stop}"' for stop in self.stops] + self._parameters())]
        blocks += [f"LICENSE {quoted('license', self.license)}"] if self.license else []
        return "\n\n".join(blocks) + "\n"

    def _parameters(self) -> list[str]:
        sampling = self.sampling
        values: dict[str, float] = {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repeat_penalty": sampling.repeat_penalty,
            "repeat_last_n": sampling.repeat_last_n,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "num_ctx": self.context,
        }
        return [f"PARAMETER {name} {value}" for name, value in values.items()]


def quoted(field: str, text: str) -> str:
    """`text` as a value that Ollama's parser reads back character by character.

    A value that begins with three quotes ends at the first line that ends in three, and there is no way to escape
    them; within it, characters that do not print are dropped. Raises `GriffinError` for a text with either.
    """
    lines = re.split(r"[\r\n]", text)
    for i, line in enumerate(lines, 1):
        if i < len(lines) and line.rstrip().endswith(_QUOTES):
            raise GriffinError(f"{field}: line {i} ends in three quotes, which end a value in a Modelfile")
        for c in line:
            if not c.isprintable() and c != "\t":
                problem = f"U+{ord(c):04X}, which does not print: Ollama would drop it"
                raise GriffinError(f"{field}: line {i} has the character {problem}")
    return f"{_QUOTES}{text}{_QUOTES}"


def license_of(path: Path, metadata: Mapping[str, Any]) -> str | None:
    """What a GGUF says of its licence: its identifier, name and address, as far as it has them; else None.

    Raises `FileFormatError` where one is no text.
    """
    found = {key: metadata[key] for key in _LICENSE_KEYS if key in metadata}
    for key, value in found.items():
        if not isinstance(value, str):
            raise FileFormatError(path, key, f"expected a string, found {type(value).__name__}")
    return "\n".join(found.values()) or None


def go_template(template: ChatTemplate | None) -> tuple[str, tuple[str, ...]]:
    """Ollama's template and stops for a file's own template.

    Raises `GriffinError` for a template that does not write Gemma's turns: it has to be translated by hand.
    """
    if template is None:
        return PLAIN_TEMPLATE, ()
    if not writes_gemma_turns(template):
        raise GriffinError(
            f"{template.path}: tokenizer.chat_template: does not write Gemma's turns, the only ones that can be put "
            "into Ollama's template language here; give one by --template FILE"
        )
    return GEMMA_TEMPLATE, GEMMA_STOPS


def writes_gemma_turns(template: ChatTemplate) -> bool:
    """Whether a conversation comes out of `template` as Gemma's, with or without BOS in front."""
    roles = (("user", "a"), ("assistant", "b"), ("user", "c"))
    text = template.render([{"role": role, "content": content} for role, content in roles])
    turns = (("user", "a"), ("model", "b"), ("user", "c"))
    gemma = "".join(f"<start_of_turn>{role}\n{content}<end_of_turn>\n" for role, content in turns)
    return text.removeprefix(template.specials.get("bos_token", "")) == gemma + "<start_of_turn>model\n"
