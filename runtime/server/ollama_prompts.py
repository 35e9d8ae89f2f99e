"""The prompts of Ollama's API: what a request may say, and the tokens that it comes to."""

from griffin_gguf.runtime.chat import ChatPrompt
from griffin_gguf.runtime.server.errors import ApiError
from griffin_gguf.runtime.server.models import Served
from griffin_gguf.runtime.server.ollama_messages import ChatRequest, GenerateRequest

_ROLES = ("system", "user", "assistant")


def cannot(model: str, capability: str) -> ApiError:
    """The error for what takes a model of another kind, in Ollama's words, which programs look for."""
    return ApiError(400, f'"{model}" does not support {capability}')


def check_generate(wanted: GenerateRequest) -> None:
    """Raise `ApiError` for what a request to generate cannot have here."""
    if wanted.suffix:
        raise cannot(wanted.model, "insert")
    if wanted.images:
        raise cannot(wanted.model, "vision")
    if wanted.raw and (wanted.template or wanted.system or wanted.context):
        raise ApiError(400, "raw mode does not support template, system, or context")
    if wanted.template:
        problem = "not supported: turns are written by the model's own template; with raw you write them yourself"
        raise ApiError(400, f"template: {problem}")


def messages(wanted: ChatRequest) -> list[dict[str, str]]:
    """The messages of a conversation. Raises `ApiError` for what is more than text."""
    if wanted.tools:
        raise cannot(wanted.model, "tools")
    found = list[dict[str, str]]()
    for i, message in enumerate(wanted.messages or []):
        role = message.role.lower()
        if message.images:
            raise cannot(wanted.model, "vision")
        if message.tool_calls or role == "tool":
            raise cannot(wanted.model, "tools")
        if role not in _ROLES:
            raise ApiError(400, f"messages[{i}].role: expected one of {', '.join(_ROLES)}, found {role[:40]!r}")
        found.append({"role": role, "content": message.content or ""})
    return found


def generate_prompt(served: Served, wanted: GenerateRequest) -> ChatPrompt:
    """The tokens of a request to generate.

    A prompt is a user's turn; with `raw`, or of a model that was not trained to converse, it is text to go on from. In
    raw text the names of control tokens are these tokens: who asks for it writes the turns. After a `context` the text
    goes on from there.
    """
    context, text = wanted.context or [], wanted.prompt or ""
    _check_tokens(context, served)
    if wanted.raw or served.template is None:
        if wanted.system:
            raise ApiError(400, f'system: "{wanted.model}" has no chat template, so none that could write it')
        return _text(served, context, text, bool(wanted.raw))
    turn = [{"role": "system", "content": wanted.system}] if wanted.system else []
    turn.append({"role": "user", "content": text})
    return _next_turn(served, context, turn) if context else served.chat(turn)


def _text(served: Served, context: list[int], text: str, special: bool) -> ChatPrompt:
    # What has been read already, a document too, has the beginning-of-sequence token in front.
    begins = not context and served.entry.document is None
    return ChatPrompt([*context, *served.model.tokenizer.encode(text, bos=begins, special=special)], ())


def _next_turn(served: Served, context: list[int], turn: list[dict[str, str]]) -> ChatPrompt:
    """A turn behind `context`, which ends with an answer: the answer's own end is the first that follows."""
    assert served.template is not None
    before = [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]
    tokens = served.template.encode_next(served.model.tokenizer, [*before, *turn])
    if tokens is None:
        raise ApiError(400, f'context: the chat template of "{served.entry.name}" needs all messages; ask /api/chat')
    return ChatPrompt([*context, *tokens], ())


def _check_tokens(context: list[int], served: Served) -> None:
    vocab = served.model.vocab
    for i, token in enumerate(context):
        if not 0 <= token < vocab:
            raise ApiError(400, f"context[{i}]: expected a token from 0 to {vocab - 1}, found {token}")
