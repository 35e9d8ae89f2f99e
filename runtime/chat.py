"""Chat: a file's own template for conversations, and the tokens that end an answer.

The template comes with the model file and is trusted no further than the file: `chat_worker.py` renders it,
sandboxed, in a process with limits on time, memory and output.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from griffin_gguf.runtime.errors import FileFormatError, GriffinError
from griffin_gguf.runtime.tokenizer import Tokenizer, array, special_id

TEMPLATE_KEY = "tokenizer.chat_template"

#: Names that end an answer wherever a vocabulary has them as control tokens. (In Gemma's, `</s>` is a mere
#: HTML tag.)
END_TOKENS = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>", "</s>")

_FIELDS = ("role", "content")
_LONGEST_TEMPLATE = 1 << 20  # characters; the longest in use are some 20,000
_WALL_SECONDS = 30.0  # the worker's limit is on processor time; this one is for a machine that stands still
_WORKER = Path(__file__).with_name("chat_worker.py")
_ANSWER = "\ufdd1answer\ufdd1"  # stands for an answer; U+FDD1 is reserved for use inside programs


#: One turn: its `role` ("user", "assistant" or what else the template knows) and its `content`.
Message = Mapping[str, str]


@dataclass(frozen=True)
class ChatTemplate:
    """The Jinja template of a GGUF; `specials` are the variables `bos_token`, `eos_token` and so on."""

    path: Path
    template: str
    specials: Mapping[str, str]

    @classmethod
    def from_gguf(cls, path: Path, metadata: Mapping[str, Any]) -> "ChatTemplate | None":
        """The template under `tokenizer.chat_template`; None where the file has none.

        Raises `FileFormatError` for a template that is no string or is absurdly long. What else may be wrong
        with it shows when it is rendered.
        """
        template = metadata.get(TEMPLATE_KEY)
        if template is None:
            return None
        if not isinstance(template, str):
            raise FileFormatError(path, TEMPLATE_KEY, f"expected a string, found {type(template).__name__}")
        if len(template) > _LONGEST_TEMPLATE:
            problem = f"expected at most {_LONGEST_TEMPLATE} characters, found {len(template)}"
            raise FileFormatError(path, TEMPLATE_KEY, problem)
        return cls(path, template, _special_names(path, metadata))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as the text the model was trained on; encode it with `special=True`.

        With `add_generation_prompt` it ends where the model's answer begins. Raises `GriffinError` with the
        template's own words where it refuses the messages (roles out of order), `FileFormatError` where the
        template is at fault or exceeds a limit of `chat_worker.py`.
        """
        _check(messages)
        variables = {
            "messages": [{field: message[field] for field in _FIELDS} for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
            **self.specials,
        }
        answer = self._ask({"template": self.template, "variables": variables})
        if "raised" in answer:
            raise GriffinError(f"messages: the chat template refuses them: {_one_line(answer['raised'])}")
        if "problem" in answer:
            raise FileFormatError(self.path, TEMPLATE_KEY, _one_line(answer["problem"]))
        return answer["text"]

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of the conversation, BOS included.

        Only the template writes control tokens: their names in a message stay text, so that nobody's message
        can end its turn and begin another's. Errors as of `render`.
        """
        return tokenizer.encode(self.render(_shielded(tokenizer, messages), add_generation_prompt), special=True)

    def encode_next(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int] | None:
        """What follows the last assistant message: for a model whose state already holds that answer.

        The answer's own end (Gemma's `<end_of_turn>`) is part of it. So a chat feeds each turn once, and the
        answer stays the tokens that were sampled, which encoding its text again need not give. None where the
        template does not show that answer's text exactly once: encode the whole conversation then.
        """
        marked = _shielded(tokenizer, messages)
        answers = [i for i, message in enumerate(marked) if message["role"] == "assistant"]
        if not answers:
            return None
        marked[answers[-1]]["content"] = _ANSWER
        parts = self.render(marked).split(_ANSWER)
        return tokenizer.encode(parts[1], bos=False, special=True) if len(parts) == 2 else None

    def _ask(self, request: dict[str, Any]) -> dict[str, str]:
        """The worker's answer; `problem` also where it did not live to give one."""
        try:
            worker = subprocess.run(
                # -P: the worker's folder is not for importing from.
                [sys.executable, "-P", str(_WORKER)],
                input=json.dumps(request).encode(),
                capture_output=True,
                timeout=_WALL_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"problem": f"the template did not end within {_WALL_SECONDS:g} s"}
        if worker.returncode == -signal.SIGPROF:
            return {"problem": "the template did not end within a second of processor time"}
        if worker.returncode:
            last = worker.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
            return {"problem": f"rendering ended with status {worker.returncode}: {last}"}
        return json.loads(worker.stdout)


def stop_tokens(metadata: Mapping[str, Any], tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end an answer.

    They are `eos`, the file's `eot_token_id` if it has one, and those of `END_TOKENS` that are control tokens
    of this vocabulary. Raises `FileFormatError` for an `eot_token_id` that is no id.
    """
    named = {tokenizer.control_tokens[name] for name in END_TOKENS if name in tokenizer.control_tokens}
    turn = special_id(tokenizer.path, metadata, "eot", tokenizer.vocab_size)
    return frozenset(named | {tokenizer.eos} | ({turn} if turn is not None else set()))


def _special_names(path: Path, metadata: Mapping[str, Any]) -> dict[str, str]:
    """The names of special tokens under the variables that transformers gives to templates."""
    tokens = array(path, metadata, "tokens", str)
    ids = {
        variable: special_id(path, metadata, name, len(tokens))
        for name, variable in (
            ("bos", "bos_token"),
            ("eos", "eos_token"),
            ("unknown", "unk_token"),
            ("padding", "pad_token"),
        )
    }
    return {variable: tokens[i] for variable, i in ids.items() if i is not None}


def _shielded(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[dict[str, str]]:
    _check(messages)
    return [{field: tokenizer.shield(message[field]) for field in _FIELDS} for message in messages]


def _check(messages: Sequence[Message]) -> None:
    for i, message in enumerate(messages):
        for field in _FIELDS:
            if not isinstance(message.get(field), str):
                raise GriffinError(f"messages[{i}].{field}: expected a string")


def _one_line(text: str, longest: int = 300) -> str:
    """`text` fit for an error message: printable, on one line, of bounded length."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= longest else line[:longest] + "…"
