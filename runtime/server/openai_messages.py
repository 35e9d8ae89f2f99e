"""The messages of OpenAI's API, as msgspec structs: requests in, answers out.

Requests take fields that are not named here and ignore them (`user`, `metadata`, `store` and the like, which change
nothing of an answer); a field of the wrong type is an error. Fields of type `Any` are here to be refused, see
`openai_requests.REFUSED`.
"""

from typing import Annotated, Any, Literal

import msgspec

from griffin_gguf.runtime.server.ollama_messages import MOST_MESSAGES

#: Why an answer ended, and what an object is.
Finish = Literal["stop", "length"]
Kind = Literal["chat.completion", "chat.completion.chunk", "text_completion"]

# -- requests ------------------------------------------------------------------------------------------


class StreamOptions(msgspec.Struct):
    """What a stream holds beside the answer."""

    include_usage: bool | None = None


class JsonSchema(msgspec.Struct):
    """A schema by name; `strict` is how it is always meant here."""

    schema: dict[str, Any] | None = None


class ResponseFormat(msgspec.Struct):
    """What an answer's text must be."""

    type: str
    json_schema: JsonSchema | None = None


class AnswerRequest(msgspec.Struct, kw_only=True):
    """What both ways of asking for text have in common; those of the second block are beyond OpenAI's."""

    model: str
    frequency_penalty: float | None = None
    logit_bias: Any = None
    max_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    response_format: ResponseFormat | None = None  # of a completion too, as other servers have it
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None

    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None


class Part(msgspec.Struct):
    """A part of a message's content."""

    type: str
    text: str | None = None


class AskedMessage(msgspec.Struct, kw_only=True):
    """A message of a conversation; the later fields are of models that can do more than text."""

    role: str
    content: str | list[Part] | None = None
    tool_calls: Any = None
    function_call: Any = None
    audio: Any = None


class ChatRequest(AnswerRequest, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[AskedMessage], msgspec.Meta(max_length=MOST_MESSAGES)]
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    logprobs: bool | None = None
    max_completion_tokens: int | None = None
    modalities: Any = None
    tool_choice: Any = None
    tools: Any = None
    top_logprobs: int | None = None
    web_search_options: Any = None


class CompletionRequest(AnswerRequest, kw_only=True):
    """POST /v1/completions: text that goes on from a prompt, or from several."""

    prompt: str | list[str | int | list[int]] | None = None
    best_of: int | None = None
    echo: Any = None
    logprobs: int | None = None
    suffix: Any = None


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """POST /v1/embeddings."""

    model: str
    input: str | list[str | int | list[int]]
    dimensions: int | None = None
    encoding_format: str | None = None


# -- answers -------------------------------------------------------------------------------------------


class PromptDetails(msgspec.Struct):
    """Of a prompt's tokens, those whose state was at hand."""

    cached_tokens: int


class Usage(msgspec.Struct):
    """Tokens of a request: a prompt counts once, however many answers it gets."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Alternative(msgspec.Struct):
    """A token with its log probability; `bytes` is null for a control token, which has none."""

    token: str
    logprob: float
    bytes: list[int] | None


class Logprob(Alternative):
    """A token of the answer, with the likeliest in its place."""

    top_logprobs: list[Alternative]


class ChatLogprobs(msgspec.Struct):
    """Of a chat's answer, or a piece of it."""

    content: list[Logprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    """The older form; `text_offset` counts the characters of `text` before each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class AnswerMessage(msgspec.Struct):
    """The message that answers."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class Delta(msgspec.Struct, omit_defaults=True):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class Choice(msgspec.Struct, kw_only=True):
    """One answer of several, or what a chunk adds to it."""

    index: int
    finish_reason: Finish | None


class ChatChoice(Choice, kw_only=True):
    """Whole, of a chat."""

    message: AnswerMessage
    logprobs: ChatLogprobs | None


class ChatDelta(Choice, kw_only=True):
    """Streamed, of a chat."""

    delta: Delta
    logprobs: ChatLogprobs | None


class TextChoice(Choice, kw_only=True):
    """Of a completion, both whole and streamed."""

    text: str
    logprobs: CompletionLogprobs | None


class AnswerObject(msgspec.Struct, kw_only=True):
    """An answer, or a chunk of it; `usage` is left out of chunks where nobody asked for it."""

    id: str
    object: Kind
    created: int  # seconds since 1970
    model: str
    system_fingerprint: str
    choices: list[Any]  # `Choice`s of one kind
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


class ModelObject(msgspec.Struct):
    """A model."""

    id: str
    created: int
    owned_by: str
    object: Literal["model"] = "model"


class ModelList(msgspec.Struct):
    """All of them."""

    data: list[ModelObject]
    object: Literal["list"] = "list"


class EmbeddingUsage(msgspec.Struct):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingObject(msgspec.Struct):
    """A vector, as numbers or as base64 of little-endian f32."""

    index: int
    embedding: msgspec.Raw | str
    object: Literal["embedding"] = "embedding"


class EmbeddingList(msgspec.Struct):
    """The answer of embeddings."""

    data: msgspec.Raw  # an array of `EmbeddingObject`
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"
