"""The messages of Ollama's native API, as msgspec structs: requests in, answers out.

Requests take fields that are not named here and ignore them, as Ollama does: its clients send fields of later versions
to servers that have never heard of them. A field of the wrong type is an error. In answers, what has no value is left
out.
"""

from typing import Annotated, Any

import msgspec

#: Messages of one conversation. Each is looked at where all other clients wait: a body may hold some hundred thousand.
MOST_MESSAGES = 10_000


class ModelRequest(msgspec.Struct, kw_only=True):
    """What every request has."""

    model: str = ""


class AnswerRequest(ModelRequest, kw_only=True):
    """What both ways of asking for text have in common."""

    stream: bool | None = None  # None: yes
    format: Any = None
    keep_alive: float | str | None = None
    options: dict[str, Any] | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class GenerateRequest(AnswerRequest, kw_only=True):
    """POST /api/generate."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None
    images: list[Any] | None = None


class AskedMessage(msgspec.Struct, kw_only=True):
    """One message of a chat; the later fields are of models that can do more than text."""

    role: str
    content: str | None = None
    images: list[Any] | None = None
    tool_calls: list[Any] | None = None


class ChatRequest(AnswerRequest, kw_only=True):
    """POST /api/chat."""

    messages: Annotated[list[AskedMessage], msgspec.Meta(max_length=MOST_MESSAGES)] | None = None
    tools: list[Any] | None = None


class VectorRequest(ModelRequest, kw_only=True):
    """What both ways of asking for vectors have in common."""

    keep_alive: float | str | None = None
    options: dict[str, Any] | None = None


class EmbedRequest(VectorRequest, kw_only=True):
    """POST /api/embed."""

    input: str | list[str] | None = None
    dimensions: int | None = None


class EmbeddingsRequest(VectorRequest, kw_only=True):
    """POST /api/embeddings, the older form."""

    prompt: str | None = None


class ShowRequest(ModelRequest, kw_only=True):
    """POST /api/show; `name` is what `model` was called once."""

    name: str = ""
    verbose: bool | None = None


class Message(msgspec.Struct):
    """A message of an answer."""

    role: str
    content: str


class TokenLogprob(msgspec.Struct):
    """A token with its log probability; `token` shows it with U+FFFD where `bytes` are only part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class Logprob(TokenLogprob, omit_defaults=True, kw_only=True):
    """A token of the answer, with the likeliest in its place."""

    top_logprobs: list[TokenLogprob] = []


class AnswerChunk(msgspec.Struct, omit_defaults=True, kw_only=True):
    """A line of an answer to generate (`response`) or chat (`message`), or all of it. Durations are in nanoseconds."""

    model: str
    created_at: str
    response: str | None = None
    message: Message | None = None
    done: bool
    done_reason: str | None = None
    context: list[int] | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None  # all tokens of the prompt
    cached_tokens: int | None = None  # of these, those whose state was at hand; beyond what Ollama has
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None
    logprobs: list[Logprob] | None = None


class EmbedAnswer(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The answer of embed."""

    model: str
    embeddings: msgspec.Raw  # an array of arrays of numbers
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None


class Details(msgspec.Struct):
    """What a model is, in a few words."""

    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class Listed(msgspec.Struct):
    """A model in the list of all."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class Running(msgspec.Struct):
    """A model in the list of those in memory."""

    name: str
    model: str
    size: int
    digest: str
    details: Details
    expires_at: str
    size_vram: int
    context_length: int


class Tensor(msgspec.Struct):
    """A tensor of a model; `shape` in ggml's order, the quickest dimension first."""

    name: str
    type: str
    shape: list[int]


class Shown(msgspec.Struct, omit_defaults=True, kw_only=True):
    """All about one model."""

    license: str
    modelfile: str
    parameters: str
    template: str
    system: str
    details: Details
    model_info: dict[str, Any]
    tensors: list[Tensor] | None = None
    capabilities: list[str]
    modified_at: str
