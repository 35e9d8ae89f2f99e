"""An Ollama Modelfile for a Griffin GGUF, as text.

Gemma's turns are the one conversation format that is translated: a file whose own Jinja template writes them
gets Ollama's Go template for them. Ollama puts BOS in front itself, as the file's `add_bos_token` asks.
"""

from griffin_gguf.runtime.chat import ChatTemplate
from griffin_gguf.runtime.errors import GriffinError
from griffin_gguf.runtime.sampling import Sampling

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


def modelfile(gguf: str, template: str, stops: tuple[str, ...], sampling: Sampling, context: int) -> str:
    """A Modelfile for the file named `gguf` beside it; `context` is the number of tokens Ollama keeps."""
    parameters: dict[str, float] = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repeat_penalty,
        "repeat_last_n": sampling.repeat_last_n,
        "num_ctx": context,
    }
    lines = [f"FROM ./{gguf}", "", f"TEMPLATE {_QUOTES}{template}{_QUOTES}", ""]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines += [f"PARAMETER {name} {value:g}" for name, value in parameters.items()]
    return "\n".join(lines) + "\n"


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
