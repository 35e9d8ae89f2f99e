"""What a request to OpenAI's API may say, checked: how answers are to be made, and of which prompts.

Where a request is silent, OpenAI's own defaults hold, which Ollama's endpoint of that form has too: temperature 1 and
top_p 1; `top_k` and the like, which OpenAI's API does not know, are taken and are off otherwise. What cannot be done
here (`REFUSED`) is an error rather than ignored.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from sys import float_info
from typing import Any, cast

from griffin_gguf.runtime.chat import ChatPrompt
from griffin_gguf.runtime.errors import UnsupportedError
from griffin_gguf.runtime.sampling import Sampling
from griffin_gguf.runtime.server.answers import Wish
from griffin_gguf.runtime.server.embeddings import bounded
from griffin_gguf.runtime.server.errors import ApiError
from griffin_gguf.runtime.server.models import Served
from griffin_gguf.runtime.server.ollama_options import stop_strings
from griffin_gguf.runtime.server.openai_messages import (
    AnswerRequest,
    AskedMessage,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    ResponseFormat,
)

#: Field -> what there is no such thing for, and the values (beside null) that ask for none.
REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "audio": ("answers are text", ()),
    "echo": ("an answer comes without its prompt", (False,)),
    "function_call": ("functions are not called", ("none", "auto")),
    "functions": ("functions are not called", ([],)),
    "logit_bias": ("tokens have no biases", ({},)),
    "modalities": ("answers are text", (["text"],)),
    "suffix": ("text goes on from a prompt only", ("",)),
    "tool_calls": ("tools are not called", ([],)),
    "tool_choice": ("tools are not called", ("none", "auto")),
    "tools": ("tools are not called", ([],)),
    "web_search_options": ("nothing is searched", ()),
}

#: Answers to one request: to `n` for each of its prompts.
MOST_ANSWERS = 32

#: Parts of all messages' contents; for the same reason as `MOST_MESSAGES`.
MOST_PARTS = 10_000

#: Alternatives to each token, by the form of the request.
_MOST_LOGPROBS = {ChatRequest: 20, CompletionRequest: 5}

#: Tokens of a completion where the request sets no limit, as in OpenAI's API; and, in a chat, how many times those that
#: the model was trained on at once, against models that never end.
_COMPLETION_TOKENS = 16
_TIMES_CONTEXT = 10

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repeat_penalty",
    "repeat_last_n",
    "presence_penalty",
    "frequency_penalty",
)


def invalid(field: str, problem: str) -> ApiError:
    """The error for a value of `field`."""
    return ApiError(400, f"{field}: {problem}", param=field)


@dataclass(frozen=True)
class Asked:
    """A request for text, checked: all but its prompts. `n` answers are wanted of each."""

    model: str
    n: int
    stream: bool
    usage: bool  # in a stream
    sampling: Sampling
    max_tokens: int | None  # None: as many as a model that ends may well say
    stop: tuple[str, ...]
    schema: dict[str, Any] | None
    top_logprobs: int | None

    @classmethod
    def of(cls, wanted: ChatRequest | CompletionRequest) -> "Asked":
        """Raises `ApiError` for what is out of range or cannot be done."""
        refuse(wanted)
        options = wanted.stream_options
        return cls(
            model=wanted.model,
            n=_count(wanted),
            stream=bool(wanted.stream),
            usage=options is not None and bool(options.include_usage),
            sampling=_sampling(wanted),
            max_tokens=_limit(wanted),
            stop=_stop(wanted.stop),
            schema=_schema(wanted.response_format),
            top_logprobs=_top_logprobs(wanted),
        )

    def wish(self, number: int, context: int) -> Wish:
        """What is wanted of the answer of that number to a prompt; each has draws of its own from a given seed.

        `context` is how many tokens at once the model was trained on.
        """
        seed = self.sampling.seed
        sampling = self.sampling if seed is None else replace(self.sampling, seed=seed + number)
        limit = _TIMES_CONTEXT * context if self.max_tokens is None else self.max_tokens
        return Wish(sampling, limit, self.stop, self.schema, self.top_logprobs)


def refuse(wanted: AnswerRequest | AskedMessage, where: str = "") -> None:
    """Raise `ApiError` where a request asks for what is not here."""
    for field, (why, neutral) in REFUSED.items():
        value = getattr(wanted, field, None)
        if value is not None and value not in neutral:
            raise invalid(where + field, f"not supported: {why}")


def messages(wanted: ChatRequest) -> list[dict[str, str]]:
    """The messages of a conversation, for the template. Raises `ApiError` for what is more than text."""
    if not wanted.messages:
        raise invalid("messages", "expected at least one")
    parts = sum(len(message.content) for message in wanted.messages if isinstance(message.content, list))
    if parts > MOST_PARTS:
        raise invalid("messages", f"expected at most {MOST_PARTS} parts of content in all, found {parts}")
    return [_message(message, f"messages[{i}].") for i, message in enumerate(wanted.messages)]


def _message(message: AskedMessage, where: str) -> dict[str, str]:
    refuse(message, where)
    role, content = _ROLES.get(message.role), message.content
    if role is None:
        raise invalid(f"{where}role", f"expected one of {', '.join(_ROLES)}, found {message.role[:40]!r}")
    if content is None:
        raise invalid(f"{where}content", "expected text, found null")
    if isinstance(content, str):
        return {"role": role, "content": content}
    for i, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise invalid(f"{where}content[{i}]", f"expected a part of type 'text', found {part.type[:40]!r}")
    return {"role": role, "content": "\n".join(part.text or "" for part in content)}


def prompts(wanted: CompletionRequest, n: int) -> list[str | list[int]]:
    """The prompts of a completion, as text or as tokens; without any, the beginning of a text."""

    def few(count: int) -> None:
        if count * n > MOST_ANSWERS:
            raise invalid("prompt", f"expected at most {MOST_ANSWERS} answers, found {count} prompts of {n} each")

    found = _texts("prompt", "" if wanted.prompt is None else wanted.prompt, few)
    if not found:
        raise invalid("prompt", "expected at least one")
    return found


def prompt_of(served: Served, prompt: str | list[int]) -> ChatPrompt:
    """What the model is to go on from."""
    if isinstance(prompt, str):
        return served.text(prompt)
    return ChatPrompt(checked_tokens("prompt", prompt, served), ())


def texts(wanted: EmbeddingRequest) -> list[str | list[int]]:
    """The texts whose vectors are wanted. Raises `ApiError` for an empty one, and for too many."""
    found = _texts("input", wanted.input, bounded)
    if not found or not all(found):
        raise invalid("input", "expected no empty text")
    if wanted.encoding_format not in (None, "float", "base64"):
        raise invalid("encoding_format", f"expected float or base64, found {wanted.encoding_format[:40]!r}")
    return found


def tokens_of(served: Served, text: str | list[int]) -> list[int]:
    """The tokens of a text whose vector is wanted."""
    return served.model.tokenizer.encode(text) if isinstance(text, str) else checked_tokens("input", text, served)


def checked_tokens(field: str, tokens: list[int], served: Served) -> list[int]:
    """`tokens`, all of them in the vocabulary."""
    vocab = served.model.vocab
    for token in tokens:
        if not 0 <= token < vocab:
            raise invalid(field, f"expected tokens from 0 to {vocab - 1}, found {token}")
    return tokens


def _texts(field: str, given: str | list[str | int | list[int]], check: Callable[[int], None]) -> list[str | list[int]]:
    """One text, or several, whose number `check` has seen; a list of numbers is one text as tokens."""
    if isinstance(given, str):
        return [given]
    if given and not isinstance(given[0], int):
        check(len(given))
    kinds = set(map(type, given))
    if kinds == {int}:
        return [cast("list[int]", given)]
    if int in kinds:
        raise invalid(field, "expected texts or tokens, found both")
    return cast("list[str | list[int]]", given)


def _limit(wanted: ChatRequest | CompletionRequest) -> int | None:
    """How many tokens an answer may have; -1 is none in other servers of this API, and so in their clients."""
    field, limit = "max_tokens", wanted.max_tokens
    if isinstance(wanted, ChatRequest) and wanted.max_completion_tokens is not None:
        field, limit = "max_completion_tokens", wanted.max_completion_tokens
    if limit is None:
        return None if isinstance(wanted, ChatRequest) else _COMPLETION_TOKENS
    if limit < -1:
        raise invalid(field, f"expected at least 0, or -1 for no limit, found {limit}")
    return None if limit == -1 else limit


def _count(wanted: ChatRequest | CompletionRequest) -> int:
    n = 1 if wanted.n is None else wanted.n
    if not 1 <= n <= MOST_ANSWERS:
        raise invalid("n", f"expected from 1 to {MOST_ANSWERS}, found {n}")
    if isinstance(wanted, CompletionRequest) and wanted.best_of not in (None, n):
        raise invalid("best_of", f"not supported beyond n: expected {n}, found {wanted.best_of}")
    return n


def _sampling(wanted: AnswerRequest) -> Sampling:
    named: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    named |= {name: value for name in _SAMPLING if (value := getattr(wanted, name)) is not None}
    if named["top_k"] == -1:
        named["top_k"] = 0  # all tokens, as other servers of this API have it
    if named["top_p"] == 0:
        named["top_p"] = float_info.min  # the likeliest token alone
    if wanted.seed is not None:
        named["seed"] = wanted.seed % 2**64  # any whole number is a seed in OpenAI's API
    try:
        return Sampling(**named)
    except UnsupportedError as error:
        field, _, problem = str(error).partition(": ")
        raise invalid(field, problem) from error


def _stop(given: str | list[str] | None) -> tuple[str, ...]:
    try:
        return stop_strings(given)
    except UnsupportedError as error:
        raise ApiError(400, str(error), param="stop") from error


def _schema(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    """The JSON schema of an answer's text; None for any text."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.type != "json_schema":
        problem = f"expected text, json_object or json_schema, found {wanted.type[:40]!r}"
        raise invalid("response_format.type", problem)
    if wanted.json_schema is None or wanted.json_schema.schema is None:
        raise invalid("response_format.json_schema", "expected an object with a schema")
    return wanted.json_schema.schema


def _top_logprobs(wanted: ChatRequest | CompletionRequest) -> int | None:
    """How many alternatives to each token; None: not even the token's own log probability."""
    if isinstance(wanted, ChatRequest):
        field, top = "top_logprobs", wanted.top_logprobs or 0
        if top and not wanted.logprobs:
            raise invalid("top_logprobs", "expected logprobs to be true with it")
        found = top if wanted.logprobs else None
    else:
        field, top = "logprobs", wanted.logprobs or 0
        found = wanted.logprobs
    most = _MOST_LOGPROBS[type(wanted)]
    if not 0 <= top <= most:
        raise invalid(field, f"expected from 0 to {most}, found {top}")
    return found
