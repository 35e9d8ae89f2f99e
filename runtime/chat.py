"""Chat: a file's own template for conversations, and the tokens that end an answer.

The template comes with the model file and is trusted no further than the file: `chat_worker.py` renders it,
sandboxed, in a process with limits on time, memory and output.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

from griffin_gguf.runtime import chat_renderer
from griffin_gguf.runtime.chat_prompt import END_TOKENS, ChatPrompt, Said, common, later_turns, marks, walk
from griffin_gguf.runtime.errors import FileFormatError, GriffinError
from griffin_gguf.runtime.tokenizer import Tokenizer, array, special_id

TEMPLATE_KEY = "tokenizer.chat_template"

_FIELDS = ("role", "content")
_LONGEST_TEMPLATE = 1 << 20  # characters; the longest in use are some 20,000
_MARK = "\ufdd1"  # around names that stand for texts; reserved by Unicode for use inside programs
_ROLES = ("system", "user", "assistant")

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
        answer = chat_renderer.ask({"template": self.template, "variables": variables})
        if "raised" in answer:
            raise GriffinError(f"messages: the chat template refuses them: {_one_line(answer['raised'])}")
        if "problem" in answer:
            raise FileFormatError(self.path, TEMPLATE_KEY, _one_line(answer["problem"]))
        return answer["text"]

    @cached_property
    def takes_system(self) -> bool:
        """Whether a system message in front is rendered. Raises `FileFormatError` for a template at fault."""
        system = f"{_MARK}system{_MARK}"
        try:
            return system in self.render([_message("system", system), _message("user", "a")])
        except FileFormatError:
            raise
        except GriffinError:
            return False

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of the conversation, BOS included.

        Only the template writes control tokens: their names in a message stay text, so that nobody's message
        can end its turn and begin another's. Where the template takes no system messages, their texts go in front
        of the next user's. Errors as of `render`.
        """
        turns = _shielded(tokenizer, self._placed(messages))
        return tokenizer.encode(self.render(turns, add_generation_prompt), special=True)

    def encode_next(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int] | None:
        """What follows the last assistant message: for a model whose state already holds that answer.

        The answer's own end (Gemma's `<end_of_turn>`) is part of it. So a chat feeds each turn once, and the
        answer stays the tokens that were sampled, which encoding its text again need not give. None where the
        template does not show that answer's text exactly once: encode the whole conversation then.
        """
        turns = _shielded(tokenizer, self._placed(messages))
        answers = _answers(turns)
        parts = self._around(turns, answers[-1:]) if answers else []
        return tokenizer.encode(parts[1], bos=False, special=True) if parts else None

    def prompt(
        self, tokenizer: Tokenizer, messages: Sequence[Message], said: Said | None = None, document: bool = False
    ) -> ChatPrompt:
        """The conversation as tokens to be answered, and where others are likely to part from it.

        Roles are "system", "user" and "assistant". The last message may be an assistant's: the answer goes on from
        its text as it stands. `said` knows the tokens that earlier answers were sampled as; they stand in place of
        the answers' texts, up to the first that it does not know.

        With `document` the model has read `opening` and a document. The tokens are what follows: two newlines, the
        first user's text with any system text before it, and the rest. Errors as of `render`, and `GriffinError`
        for other roles and where no message is there to be answered, or no user's right behind the document.
        """
        _check(messages, _ROLES)
        turns = self._placed(messages, document)
        begun = turns.pop()["content"] if turns and turns[-1]["role"] == "assistant" else None
        if not turns or (document and turns[0]["role"] != "user"):
            raise GriffinError("messages: expected a user's " + ("behind the document" if document else "to answer"))
        spans = self._spans(tokenizer, turns, said, document)
        written = [token for span in spans for token in span]
        answer: Sequence[int] = ()
        if begun is not None:
            known = said(written, begun) if said else None
            answer = tokenizer.encode(begun, bos=False) if known is None else known
        tokens = [*written, *answer]
        system = self._system_end(tokenizer, messages, tokens, document)
        return ChatPrompt(tokens, marks(tokens, later_turns(tokenizer, spans), system, len(answer)), len(answer))

    def opening(self, tokenizer: Tokenizer) -> list[int]:
        """What stands before the first user's text, BOS included: a document that is read in a turn begins so.

        Raises `FileFormatError` where the template does not show that text exactly once.
        """
        parts = self._around([_message("user", "")], [0])
        if not parts:
            raise self._hidden()
        return tokenizer.encode(parts[0], special=True)

    def _placed(self, messages: Sequence[Message], document: bool = False) -> list[dict[str, str]]:
        """`messages` with system texts where they have a place; behind a document that is the user's text."""
        _check(messages)
        found = [_message(message["role"], message["content"]) for message in messages]
        if any(message["role"] == "system" for message in found) and (document or not self.takes_system):
            return _merged(found)
        return found

    def _spans(
        self, tokenizer: Tokenizer, turns: Sequence[Message], said: Said | None, document: bool
    ) -> list[list[int]]:
        """The spans of a conversation, as `chat_prompt` has them; answers that `said` does not know are text."""
        shielded, answers = _shielded(tokenizer, turns), _answers(turns)
        spans: list[list[int]] = []
        parts = self._around(shielded, answers, document) if said and answers else []
        if said and parts:
            spans = walk(tokenizer, parts, [turns[i]["content"] for i in answers], said, bos=not document)
            if len(spans) == len(answers) + len(parts):
                return spans
            spans.pop()  # the text before an answer is encoded together with it, as `encode` does
        parts = self._around(shielded, answers[: len(spans) // 2], document)
        if not parts:
            spans, parts = [], self._around(shielded, [], document)
        if not parts:
            raise self._hidden()
        return [*spans, tokenizer.encode(parts[-1], bos=not (spans or document), special=True)]

    def _system_end(
        self, tokenizer: Tokenizer, messages: Sequence[Message], tokens: Sequence[int], document: bool
    ) -> int | None:
        """How many of `tokens` are the same under this leading system text whatever the user says; None without one.

        Space at the end is left out: it may be one token with the user's.
        """
        leading = list(takewhile(lambda message: message["role"] == "system", messages))
        if not any(message["content"].strip() for message in leading):
            return None
        user = _mark(leading) + "user" + _mark(leading)
        turns = _shielded(tokenizer, self._placed([*leading, _message("user", user)], document))
        parts = self._around(turns, [], document)
        text, shown, _ = (parts or [""])[-1].partition(user)
        return common(tokens, tokenizer.encode(text.rstrip(), bos=not document, special=True)) if shown else None

    def _around(self, turns: Sequence[Message], hidden: Sequence[int], document: bool = False) -> list[str]:
        """The rendered text before, between and behind the contents of the messages `hidden`.

        With `document` the first part begins behind it. Empty where one of these does not show exactly once.
        """
        mark = _mark(turns)
        marked = [dict(turn) for turn in turns]
        cuts = [f"{mark}{i}{mark}" for i in hidden]
        for i, cut in zip(hidden, cuts, strict=True):
            marked[i]["content"] = cut
        if document:
            cuts.insert(0, f"{mark}document{mark}")
            marked[0]["content"] = f"{cuts[0]}\n\n{marked[0]['content']}"
        pieces = re.split(f"({'|'.join(map(re.escape, cuts)) or '(?!)'})", self.render(marked))
        return pieces[::2][int(document) :] if pieces[1::2] == cuts else []

    def _hidden(self) -> FileFormatError:
        return FileFormatError(self.path, TEMPLATE_KEY, "does not show a message's text exactly once")


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


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _answers(turns: Sequence[Message]) -> list[int]:
    """Which of the messages are the assistant's."""
    return [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]


def _merged(messages: Sequence[Message]) -> list[dict[str, str]]:
    """System texts in front of the next user's; what no user follows is a user's message itself."""
    merged: list[dict[str, str]] = []
    waiting: list[str] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "system":
            waiting += [content] if content.strip() else []
            continue
        if role == "user":
            content, waiting = "\n\n".join([*waiting, content]), []
        merged.append(_message(role, content))
    return [*merged, _message("user", "\n\n".join(waiting))] if waiting else merged


def _mark(messages: Sequence[Message]) -> str:
    """What no message contains."""
    mark = _MARK
    while any(mark in message["content"] for message in messages):
        mark += mark
    return mark


def _shielded(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[dict[str, str]]:
    _check(messages)
    return [{field: tokenizer.shield(message[field]) for field in _FIELDS} for message in messages]


def _check(messages: Sequence[Message], roles: Sequence[str] = ()) -> None:
    """Raise `GriffinError` for what is no message, or of none of `roles` where some are given."""
    for i, message in enumerate(messages):
        for field in _FIELDS:
            if not isinstance(message.get(field), str):
                raise GriffinError(f"messages[{i}].{field}: expected a string")
        if roles and message["role"] not in roles:
            raise GriffinError(f"messages[{i}].role: expected {', '.join(roles)}, found {message['role'][:40]!r}")


def _one_line(text: str, longest: int = 300) -> str:
    """`text` fit for an error message: printable, on one line, of bounded length."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= longest else line[:longest] + "…"
