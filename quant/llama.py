"""Models of other architectures, run by llama.cpp for measuring: Gemma, Llama, Mistral, Qwen, Mamba, RWKV and others.

llama-cpp-python brings llama.cpp along, on the same ggml as ours. Of it only the plain C functions are used. A model
has one context; each state is one of its sequences, so that a copy shares the keys and values that both have read.
"""

import atexit
import ctypes
import functools
import os
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import llama_cpp
import numpy as np
from gguf import LlamaFileType
from numpy.typing import NDArray

from griffin_gguf.quant.runner import FileFacts
from griffin_gguf.runtime.errors import BackendError, FileFormatError, GriffinError, UnsupportedError
from griffin_gguf.runtime.ggml import abi
from griffin_gguf.runtime.ggml.log import capture, last_error
from griffin_gguf.runtime.machine import compute_threads

#: Tokens that go through the weights at once: llama.cpp's own default (n_ubatch).
CHUNK = 512

#: States at once: one that is kept, one that goes on from it, and the next of those. A recurrent model allocates all.
_STATES = 3

_EVERY_LOGITS = 1 << 24  # that one pass may compute when every token's are asked for (64 MiB as f32)
_NO_SLOT = 1  # llama_decode: no room for so many keys and values
_NO_VOCABULARY = 0  # enum llama_vocab_type
_LONGEST_TEXT = 2**31 - 1  # bytes: C's int

#: Its types ask for pointers that were checked, where it takes whatever its own functions give.
_c: Any = llama_cpp

_BATCH_TYPES: dict[str, Any] = dict(_c.llama_batch._fields_)

_messages: deque[str] = deque(maxlen=8)
_open: "weakref.WeakSet[LlamaRunner]" = weakref.WeakSet()


@_c.llama_log_callback
def _keep(level: int, text: bytes, _: Any) -> None:
    if level == abi.LOG_LEVEL_ERROR:
        _messages.append(text.decode(errors="replace").strip())


class LlamaState:
    """What a text has become: one sequence of the runner's context, given back with the object."""

    def __init__(self, runner: "LlamaRunner", sequence: int, read: "list[_Stretch]") -> None:
        self._runner, self.sequence, self.read = runner, sequence, read

    @property
    def position(self) -> int:
        """Tokens read so far."""
        return sum(stretch.length for stretch in self.read)

    def copy(self) -> "LlamaState":
        """The same text, to go its own way. Raises `UnsupportedError` where there is no room for one more."""
        return self._runner.copy(self)


class _Stretch:
    """Tokens that one state has read, and those that were copied from it since share with it."""

    length = 0


class LlamaRunner:
    """A `Runner` by llama.cpp; made by `open_runner`. Its states share room for `context` tokens.

    A model whose memory is fixed, such as Mamba or RWKV, reads on without end. Raises `UnsupportedError` for what
    llama.cpp knows no way to run, or to predict the next token with; `BackendError` where it fails.
    """

    name = "llama.cpp"
    chunk = CHUNK

    def __init__(self, facts: FileFacts, *, threads: int | None, context: int) -> None:
        if context < 1:
            raise UnsupportedError(f"context: expected at least 1 token, found {context}")
        self.path, self.architecture, self.type = facts.path, facts.architecture, facts.type
        self.parameters, self.weights_nbytes, self.file_size = facts.parameters, facts.weights_nbytes, facts.file_size
        self.threads, self.room = threads or compute_threads(), context
        _listen()
        self._model = _load(facts)
        self._context = None
        self._free = weakref.finalize(self, _c.llama_model_free, self._model)
        try:
            self._vocab = _causal_vocabulary(facts, self._model)
            self.vocab = _c.llama_vocab_n_tokens(self._vocab)
            self.context = _c.llama_model_n_ctx_train(self._model)
            self._every = min(CHUNK, max(1, _EVERY_LOGITS // self.vocab))
            self._context = self._new_context()
            self._memory = self._text_memory()
        except BaseException:
            self._free()
            raise
        self._free.detach()
        self._free = weakref.finalize(self, _release, self._context, self._model)
        self._free.atexit = False
        _open.add(self)
        self._batch = _Batch(CHUNK)
        self._bounded = not _c.llama_model_is_recurrent(self._model)
        self._sequences = list(range(_STATES))
        self._states = weakref.WeakSet[LlamaState]()

    def _new_context(self) -> Any:
        params = _c.llama_context_default_params()
        params.n_ctx = max(self.room, CHUNK)  # a smaller one would make smaller chunks
        params.n_batch = params.n_ubatch = CHUNK
        params.n_seq_max = _STATES
        params.n_outputs_max = self._every
        params.n_threads = params.n_threads_batch = self.threads
        params.kv_unified = True  # one store of keys and values for all sequences
        params.swa_full = False  # a layer with a window keeps no more than that
        if not (context := _c.llama_init_from_model(self._model, params)):
            raise BackendError(f"{self.path}: llama.cpp cannot make room for {self.room:,} tokens{_last()}")
        return context

    def _text_memory(self) -> Any:
        """What the context keeps of a text; BERT and others of its kind keep nothing."""
        if not (memory := _c.llama_get_memory(self._context)):
            _c.llama_free(self._context)
            raise _not_causal(self.path, self.architecture)
        return memory

    @property
    def description(self) -> str:
        """Architecture, size and file type, see `Runner`."""
        words = ctypes.create_string_buffer(128)
        _c.llama_model_desc(self._model, words, len(words))
        return words.value.decode(errors="replace")

    @property
    def bos(self) -> int | None:
        """The token that a text begins with, None where the model has none put before it."""
        if not _c.llama_vocab_get_add_bos(self._vocab):
            return None
        token = _c.llama_vocab_bos(self._vocab)
        return token if token >= 0 else None

    @property
    def state_nbytes(self) -> int | None:
        """Bytes of a state, as llama.cpp would store it; None where they grow with what it has read."""
        if self._bounded:
            return None
        state = next((state for state in self._states if state.position), None)
        if state is None:
            state = self.new_state()
            self.forward([0], state)
        return _c.llama_state_seq_get_size(self._context, state.sequence)

    def encode(self, text: str) -> list[int]:
        """Tokens of a whole text, `bos` first; see `Runner`."""
        try:
            raw = text.encode()
        except UnicodeEncodeError as error:
            raise GriffinError(f"text: expected Unicode, found a lone surrogate at character {error.start}") from None
        if len(raw) > _LONGEST_TEXT:
            raise UnsupportedError(f"text: llama.cpp reads {_LONGEST_TEXT:,} bytes at once, found {len(raw):,}")
        tokens = (_c.llama_token * (len(raw) + 2))()  # each has a byte at least, but for a space before the text
        count = _c.llama_tokenize(self._vocab, raw, len(raw), tokens, len(tokens), False, False)
        if count < 0:
            raise BackendError(f"{self.path}: llama.cpp makes no tokens of the text: status {count}{_last()}")
        begin = [] if self.bos is None else [self.bos]
        return begin + tokens[:count]

    def piece(self, token: int) -> bytes:
        """The bytes that a token adds to a text; see `Runner`."""
        self._checked([token])
        room = 64
        while True:
            piece = ctypes.create_string_buffer(room)
            length = _c.llama_token_to_piece(self._vocab, token, piece, room, 0, False)
            if length >= 0:
                return piece.raw[:length]
            room = -length

    def new_state(self) -> LlamaState:
        """Begin a text. Raises `UnsupportedError` where `_STATES` of them are in use."""
        return self._state([])

    def copy(self, state: LlamaState) -> LlamaState:
        """Another state that has read the same; for `LlamaState.copy`."""
        made = self._state([stretch for stretch in state.read if stretch.length])
        _c.llama_memory_seq_cp(self._memory, state.sequence, made.sequence, -1, -1)
        if state.read[-1].length:
            state.read.append(_Stretch())  # from here on each has its own
        return made

    def _state(self, read: list[_Stretch]) -> LlamaState:
        self._check_open()
        if not self._sequences:
            raise UnsupportedError(f"{self.path}: {_STATES} states are in use, and no more can be")
        state = LlamaState(self, self._sequences.pop(), [*read, _Stretch()])
        weakref.finalize(state, _forget, weakref.ref(self), state.sequence).atexit = False
        self._states.add(state)
        return state

    def give_back(self, sequence: int) -> None:
        """A state is gone: forget what it has read."""
        if self._context:
            _c.llama_memory_seq_rm(self._memory, sequence, -1, -1)
            self._sequences.append(sequence)

    def forward(self, tokens: Sequence[int], state: LlamaState, every: bool = False) -> NDArray[np.float32]:
        """Logits after the last token, [V], or with `every` after each, [T, V]; see `Runner`."""
        self._check_open()
        ids = self._checked(tokens)
        if state not in self._states:
            raise UnsupportedError(f"state: was not made by this model, {self.path}")
        read = sum(s.length for s in {s for state in self._states for s in state.read})
        if self._bounded and read + len(ids) > self.room:
            raise UnsupportedError(
                f"{self.path}: a context of {self.room:,} tokens cannot hold {len(ids):,} beside {read:,}"
            )
        step = self._every if every else CHUNK
        pieces = [ids[start : start + step] for start in range(0, len(ids), step)]
        logits = [self._decode(piece, state, every, piece is pieces[-1]) for piece in pieces]
        return np.concatenate(logits) if every else logits[-1][-1]

    def _decode(self, ids: NDArray[np.int32], state: LlamaState, every: bool, end: bool) -> NDArray[np.float32]:
        """One pass over at most a chunk; logits of all its tokens, or of the last where it is the end, [·, V]."""
        rows = self._batch.fill(ids, state.position, state.sequence, every, end)
        if status := _c.llama_decode(self._context, self._batch.as_c):
            problem = "has no room for more keys and values" if status == _NO_SLOT else f"failed with status {status}"
            raise BackendError(f"{self.path}: llama.cpp {problem}{_last()}")
        state.read[-1].length += len(ids)
        _c.llama_synchronize(self._context)
        if not rows:
            return np.empty((0, self.vocab), np.float32)
        found = _c.llama_get_logits(self._context)
        return np.ctypeslib.as_array(found, (rows, self.vocab)).copy()

    def _checked(self, tokens: Sequence[int]) -> NDArray[np.int32]:
        wide = np.asarray(tokens)
        if wide.ndim != 1 or not wide.size or wide.dtype.kind not in "iu":
            raise UnsupportedError(f"tokens: expected whole numbers, at least one, found {wide.dtype} {wide.shape}")
        outside = wide[(wide < 0) | (wide >= self.vocab)]
        if outside.size:
            raise UnsupportedError(f"tokens: {outside[0]} is outside the vocabulary of {self.vocab}")
        return wide.astype(np.int32)

    def _check_open(self) -> None:
        if not self._context:
            raise UnsupportedError(f"{self.path}: the model is closed")

    def close(self) -> None:
        """Give all memory back."""
        self._context = None
        self._free()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class _Batch:
    """Room for a chunk of one sequence's tokens, as llama.cpp wants them."""

    def __init__(self, size: int) -> None:
        self._tokens, self._positions = np.empty((2, size), np.int32)
        self._ones, self._wanted = np.ones(size, np.int32), np.empty(size, np.int8)
        self._sequence = np.empty(1, np.int32)
        self._sequences = np.full(size, self._sequence.ctypes.data, np.uintp)  # int32 **: all point to the one
        self.as_c = llama_cpp.llama_batch()
        for name, array in (
            ("token", self._tokens),
            ("pos", self._positions),
            ("n_seq_id", self._ones),
            ("seq_id", self._sequences),
            ("logits", self._wanted),
        ):
            setattr(self.as_c, name, ctypes.cast(array.ctypes.data, _BATCH_TYPES[name]))

    def fill(self, ids: NDArray[np.int32], position: int, sequence: int, every: bool, end: bool) -> int:
        """Put tokens in; logits of all, or of the last where it is the `end` of what is read. How many logits."""
        count = self.as_c.n_tokens = len(ids)
        self._tokens[:count] = ids
        self._positions[:count] = np.arange(position, position + count)
        self._sequence[0] = sequence
        self._wanted[:count] = every
        self._wanted[count - 1] = every or end
        return count if every else int(end)


def type_words(name: str) -> str:
    """A file type as llama.cpp writes it: Q4_K - Medium for Q4_K_M; a name that it does not know stays."""
    numbers = [kind for kind in LlamaFileType if kind.name.partition("_")[2] == name]
    return _c.llama_ftype_name(int(numbers[0])).decode() if numbers else name


def _release(context: Any, model: Any) -> None:
    _c.llama_free(context)
    _c.llama_model_free(model)


def _forget(runner: "weakref.ref[LlamaRunner]", sequence: int) -> None:
    if found := runner():
        found.give_back(sequence)


def _listen() -> None:
    """Hear llama.cpp's messages; ggml's, which it takes along, go back to the runtime's log."""
    _c.llama_log_set(_keep, ctypes.c_void_p(0))
    capture(abi.load())
    _messages.clear()
    _give_up_at_exit()


@functools.cache
def _give_up_at_exit() -> None:
    atexit.register(_give_up)


def _give_up() -> None:
    """Close what is open, while its messages can still be heard: no Python may be called at the very end."""
    for runner in list(_open):
        runner.close()
    _c.llama_log_set(ctypes.cast(0, _c.llama_log_callback), ctypes.c_void_p(0))


def _last() -> str:
    """What llama.cpp or else ggml has complained of, in brackets, or nothing; it is told once."""
    first = _messages[0] if _messages else ""
    _messages.clear()
    below = last_error()
    return f" ({first.rpartition('error loading model: ')[2]})" if first else below


def _load(facts: FileFacts) -> Any:
    """The model. Raises `UnsupportedError` where llama.cpp does not know the architecture."""
    params = _c.llama_model_default_params()
    if model := _c.llama_model_load_from_file(os.fsencode(facts.path), params):
        return model
    if any("unknown model architecture" in message for message in _messages):
        raise UnsupportedError(
            f"{facts.path}: general.architecture: neither griffin nor llama.cpp runs {facts.architecture!r}"
        )
    raise FileFormatError(facts.path, "model", f"llama.cpp cannot load it{_last()}")


def _causal_vocabulary(facts: FileFacts, model: Any) -> Any:
    """The vocabulary of a model that predicts the next token of a text; raises `UnsupportedError` for others."""
    if not _c.llama_model_has_decoder(model) or _c.llama_model_has_encoder(model) or _c.llama_model_is_diffusion(model):
        raise _not_causal(facts.path, facts.architecture)
    vocab = _c.llama_model_get_vocab(model)
    if _c.llama_vocab_type(vocab) == _NO_VOCABULARY:
        raise UnsupportedError(f"{facts.path}: tokenizer.ggml.model: expected a vocabulary, found none")
    return vocab


def _not_causal(path: Path, architecture: str) -> UnsupportedError:
    return UnsupportedError(f"{path}: general.architecture: {architecture!r} does not predict a text's next token")


_listen()  # importing llama_cpp has turned all messages to stderr
