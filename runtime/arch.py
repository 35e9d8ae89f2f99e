"""What a Griffin GGUF holds: its hyperparameters and ONE table of its tensors.

The converter, the quantizer, the reader and both backends walk these two tables; nothing else in the
project knows a tensor's name. docs/gguf-format.md is the same in prose.

Dimension letters, used in every shape of the project (shapes in NumPy's order, slowest dimension first;
GGUF's `ne` is the reverse):

    V vocabulary      H hidden width      F MLP width       L layers        T tokens of a chunk
    N query heads     K key/value heads   D head width      Q = N·D         J = K·D
    W RG-LRU width    G gate blocks       B = W/G           C taps of the convolution
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, cast

from gguf import GGUFValueType

from griffin_gguf.runtime.errors import FileFormatError, UnsupportedError

ARCHITECTURE = "recurrentgemma"

#: Key of the checksums: an array of one hex SHA-256 a tensor, in file order, over its bytes without the padding.
CHECKSUMS = "griffin.tensor_sha256"


class Role(Enum):
    """What a tensor does; recipes choose its type by this."""

    EMBEDDING = "embedding"
    OUTPUT = "output"
    ATTN_Q = "attn_q"
    ATTN_K = "attn_k"
    ATTN_V = "attn_v"
    ATTN_OUTPUT = "attn_output"
    FFN_GATE = "ffn_gate"
    FFN_UP = "ffn_up"
    FFN_DOWN = "ffn_down"
    RECURRENT_LINEAR = "recurrent_linear"  # linear_x, linear_y, linear_out
    RECURRENT_GATE = "recurrent_gate"  # block-diagonal input and recurrence gates
    CONV = "conv"
    VECTOR = "vector"  # norms, biases, decay: one dimension


class Transform(Enum):
    """How a checkpoint tensor becomes the GGUF's; `convert/transforms.py` has the functions."""

    NONE = "none"
    ADD_ONE = "1 + w"  # norm(x) = x·rsqrt(mean x² + eps)·(1 + w): the 1 is folded in
    SQUEEZE_TAPS = "[W, 1, C] -> [W, C]"
    TRANSPOSE_BLOCKS = "[G, in, out] -> [G, out, in]"  # c @ W becomes ggml's W·c, rows along the input
    FLATTEN = "[G, B] -> [W]"
    DECAY = "-8·softplus(Λ)"  # log a = r · this


class Layers(Enum):
    """Which layers have a tensor."""

    MODEL = "once"
    EVERY = "every layer"
    RECURRENT = "recurrent layers"
    ATTENTION = "attention layers"


class Presence(Enum):
    """Whether a tensor must be there."""

    ALWAYS = "always"
    ATTENTION_BIAS = "all or none of them"
    UNTIED = "only where the head is not the embedding"


@dataclass(frozen=True)
class TensorSpec:
    """One row of the table. `{i}` in a name stands for the layer; shapes are dimension letters."""

    name: str
    source: str
    shape: str
    role: Role
    layers: Layers = Layers.EVERY
    transform: Transform = Transform.NONE
    source_shape: str = ""  # as `shape` where empty
    presence: Presence = Presence.ALWAYS


def _linear(name: str, source: str, shape: str, role: Role, layers: Layers) -> tuple[TensorSpec, TensorSpec]:
    """A weight [out, in] and its bias [out]."""
    return (
        TensorSpec(f"{name}.weight", f"{source}.weight", shape, role, layers),
        TensorSpec(f"{name}.bias", f"{source}.bias", shape.split()[0], Role.VECTOR, layers),
    )


def _projection(name: str, source: str, shape: str, role: Role) -> tuple[TensorSpec, TensorSpec]:
    """A query, key or value projection: its bias is there only under `attention_bias`."""
    weight, bias = _linear(name, source, shape, role, Layers.ATTENTION)
    optional = TensorSpec(bias.name, bias.source, bias.shape, bias.role, bias.layers, presence=Presence.ATTENTION_BIAS)
    return weight, optional


def _norm(name: str, source: str, layers: Layers = Layers.EVERY) -> TensorSpec:
    return TensorSpec(f"{name}.weight", f"{source}.weight", "H", Role.VECTOR, layers, Transform.ADD_ONE)


def _gate(name: str, source: str) -> tuple[TensorSpec, TensorSpec]:
    """A block-diagonal gate of the RG-LRU: G blocks [B out, B in] and their biases."""
    weight = TensorSpec(
        f"{name}.weight",
        f"{source}_weight",
        "G B B",
        Role.RECURRENT_GATE,
        Layers.RECURRENT,
        Transform.TRANSPOSE_BLOCKS,
    )
    bias = TensorSpec(
        f"{name}.bias", f"{source}_bias", "W", Role.VECTOR, Layers.RECURRENT, Transform.FLATTEN, source_shape="G B"
    )
    return weight, bias


_BLOCK = "model.layers.{i}."
_TEMPORAL = "model.layers.{i}.temporal_block."
_MLP = "model.layers.{i}.mlp_block."
_CONV, _LRU = _TEMPORAL + "conv_1d", _TEMPORAL + "rg_lru."

#: Every tensor of a Griffin GGUF, in file order: first those of the model, then layer by layer.
TENSORS: tuple[TensorSpec, ...] = (
    TensorSpec("token_embd.weight", "model.embed_tokens.weight", "V H", Role.EMBEDDING, Layers.MODEL),
    _norm("output_norm", "model.final_norm", Layers.MODEL),
    TensorSpec("output.weight", "lm_head.weight", "V H", Role.OUTPUT, Layers.MODEL, presence=Presence.UNTIED),
    _norm("blk.{i}.attn_norm", _BLOCK + "temporal_pre_norm"),
    *_projection("blk.{i}.attn_q", _TEMPORAL + "q_proj", "Q H", Role.ATTN_Q),
    *_projection("blk.{i}.attn_k", _TEMPORAL + "k_proj", "J H", Role.ATTN_K),
    *_projection("blk.{i}.attn_v", _TEMPORAL + "v_proj", "J H", Role.ATTN_V),
    *_linear("blk.{i}.attn_output", _TEMPORAL + "o_proj", "H Q", Role.ATTN_OUTPUT, Layers.ATTENTION),
    *_linear("blk.{i}.ssm_x", _TEMPORAL + "linear_x", "W H", Role.RECURRENT_LINEAR, Layers.RECURRENT),
    *_linear("blk.{i}.ssm_y", _TEMPORAL + "linear_y", "W H", Role.RECURRENT_LINEAR, Layers.RECURRENT),
    TensorSpec("blk.{i}.ssm_conv1d.weight", _CONV + ".weight", "W C", Role.CONV, Layers.RECURRENT,
               Transform.SQUEEZE_TAPS, source_shape="W 1 C"),
    TensorSpec("blk.{i}.ssm_conv1d.bias", _CONV + ".bias", "W", Role.VECTOR, Layers.RECURRENT),
    *_gate("blk.{i}.ssm_gate_i", _LRU + "input_gate"),
    *_gate("blk.{i}.ssm_gate_r", _LRU + "recurrent_gate"),
    TensorSpec("blk.{i}.ssm_a", _LRU + "recurrent_param", "W", Role.VECTOR, Layers.RECURRENT, Transform.DECAY),
    *_linear("blk.{i}.ssm_out", _TEMPORAL + "linear_out", "H W", Role.RECURRENT_LINEAR, Layers.RECURRENT),
    _norm("blk.{i}.ffn_norm", _BLOCK + "channel_pre_norm"),
    *_linear("blk.{i}.ffn_gate", _MLP + "gate_proj", "F H", Role.FFN_GATE, Layers.EVERY),
    *_linear("blk.{i}.ffn_up", _MLP + "up_proj", "F H", Role.FFN_UP, Layers.EVERY),
    *_linear("blk.{i}.ffn_down", _MLP + "down_proj", "H F", Role.FFN_DOWN, Layers.EVERY),
)  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """A row of `TENSORS` at its place in one model: names filled in, shapes in numbers."""

    spec: TensorSpec
    layer: int  # -1 for the model's own
    name: str
    source: str
    shape: tuple[int, ...]
    source_shape: tuple[int, ...]

    @property
    def role(self) -> Role:
        """What the tensor does."""
        return self.spec.role


@dataclass(frozen=True)
class Hyperparameters:
    """The numbers of one Griffin, in the field's words; `KEYS` says where each lies in a GGUF."""

    layers: int  # L
    context: int  # tokens of the training texts; no limit of the model
    hidden: int  # H
    mlp_width: int  # F
    vocab: int  # V
    heads: int  # N
    kv_heads: int  # K
    head_width: int  # D
    window: int  # keys a query sees, itself included
    norm_eps: float
    rope_width: int  # leading dimensions of a head that RoPE turns
    rope_base: float
    logit_cap: float  # logits = cap · tanh(z / cap)
    embedding_scale: float  # bf16(sqrt(H)): 50.5 for H = 2560
    conv_taps: int  # C
    lru_width: int  # W
    gate_blocks: int  # G
    recurrent: tuple[bool, ...]  # per layer: RG-LRU (True) or local attention
    attention_bias: bool = False
    untied: bool = False

    @property
    def dimensions(self) -> dict[str, int]:
        """The letters of this module's head in numbers."""
        return {
            "V": self.vocab, "H": self.hidden, "F": self.mlp_width, "Q": self.heads * self.head_width,
            "J": self.kv_heads * self.head_width, "W": self.lru_width, "G": self.gate_blocks,
            "B": self.lru_width // self.gate_blocks, "C": self.conv_taps, "1": 1,
        }  # fmt: skip

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor this model has, in file order."""
        model = [spec for spec in TENSORS if spec.layers is Layers.MODEL]
        block = [spec for spec in TENSORS if spec.layers is not Layers.MODEL]
        yield from (self._place(spec, -1) for spec in model if self._has(spec))
        for i in range(self.layers):
            kind = Layers.RECURRENT if self.recurrent[i] else Layers.ATTENTION
            yield from (self._place(s, i) for s in block if s.layers in (kind, Layers.EVERY) and self._has(s))

    @property
    def parameters(self) -> int:
        """Number of weights, a tied head counted once."""
        total = 0
        for tensor in self.tensors():
            size = 1
            for n in tensor.shape:
                size *= n
            total += size
        return total

    def _has(self, spec: TensorSpec) -> bool:
        return {
            Presence.ALWAYS: True,
            Presence.ATTENTION_BIAS: self.attention_bias,
            Presence.UNTIED: self.untied,
        }[spec.presence]

    def _place(self, spec: TensorSpec, layer: int) -> Tensor:
        letters = self.dimensions
        shape = tuple(letters[c] for c in spec.shape.split())
        source_shape = tuple(letters[c] for c in (spec.source_shape or spec.shape).split())
        return Tensor(spec, layer, spec.name.format(i=layer), spec.source.format(i=layer), shape, source_shape)


_U32, _F32, _BOOLS = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.ARRAY

#: Field of `Hyperparameters` -> (GGUF key under "recurrentgemma.", its type, largest value we accept).
#: The bounds only keep a hostile file from asking for absurd memory.
KEYS: dict[str, tuple[str, GGUFValueType, float]] = {
    "layers": ("block_count", _U32, 4096),
    "context": ("context_length", _U32, 2**31),
    "hidden": ("embedding_length", _U32, 2**20),
    "mlp_width": ("feed_forward_length", _U32, 2**22),
    "vocab": ("vocab_size", _U32, 2**24),
    "heads": ("attention.head_count", _U32, 2**16),
    "kv_heads": ("attention.head_count_kv", _U32, 2**16),
    "head_width": ("attention.key_length", _U32, 2**16),
    "window": ("attention.sliding_window", _U32, 2**20),
    "norm_eps": ("attention.layer_norm_rms_epsilon", _F32, 1.0),
    "rope_width": ("rope.dimension_count", _U32, 2**16),
    "rope_base": ("rope.freq_base", _F32, 1e12),
    "logit_cap": ("final_logit_softcapping", _F32, 1e6),
    "embedding_scale": ("embedding_scale", _F32, 1e6),
    "conv_taps": ("ssm.conv_kernel", _U32, 64),
    "lru_width": ("ssm.inner_size", _U32, 2**20),
    "gate_blocks": ("ssm.group_count", _U32, 2**16),
    "recurrent": ("attention.recurrent_layers", _BOOLS, 1),
}

#: Keys that other programs look for and that follow from the fields above.
_DERIVED: dict[str, tuple[str, int | None]] = {
    "attention.value_length": ("head_width", None),
    "ssm.state_size": ("", 1),  # one number per channel
}


def key(suffix: str) -> str:
    """The full GGUF key of an architecture's hyperparameter."""
    return f"{ARCHITECTURE}.{suffix}"


def to_metadata(hp: Hyperparameters) -> dict[str, tuple[Any, GGUFValueType]]:
    """The GGUF keys that hold `hp`, with their types."""
    pairs: dict[str, tuple[Any, GGUFValueType]] = {}
    for name, (suffix, kind, _) in KEYS.items():
        value = getattr(hp, name)
        pairs[key(suffix)] = (list(value) if name == "recurrent" else value, kind)
    for suffix, (name, constant) in _DERIVED.items():
        pairs[key(suffix)] = (constant if constant is not None else getattr(hp, name), _U32)
    return pairs


def from_metadata(path: Path, metadata: Mapping[str, Any], tensor_names: Iterable[str]) -> Hyperparameters:
    """Read and check the hyperparameters of a GGUF.

    `metadata` maps keys to plain Python values; `tensor_names` tell whether q, k and v have biases and the
    head its own weights. Raises `UnsupportedError` for another architecture, `FileFormatError` for a key
    that is absent, of the wrong type, out of bounds or at odds with another.
    """
    found = metadata.get("general.architecture")
    if found != ARCHITECTURE:
        raise UnsupportedError(f"{path}: general.architecture: this is {found!r}; only {ARCHITECTURE!r} runs here")
    names = set(tensor_names)
    fields = {name: _field(path, metadata, *row) for name, row in KEYS.items()}
    hp = Hyperparameters(
        **fields,
        attention_bias=any(n.endswith("attn_q.bias") for n in names),
        untied="output.weight" in names,
    )
    for field, problem in inconsistencies(hp):
        raise FileFormatError(path, key(KEYS[field][0]), problem)
    for suffix, (name, constant) in _DERIVED.items():
        expected = constant if constant is not None else getattr(hp, name)
        if metadata.get(key(suffix), expected) != expected:
            raise FileFormatError(path, key(suffix), f"expected {expected}, found {metadata[key(suffix)]}")
    return hp


def _field(path: Path, metadata: Mapping[str, Any], suffix: str, kind: GGUFValueType, limit: float) -> Any:
    """One hyperparameter, of the right type and within bounds."""
    name = key(suffix)
    if name not in metadata:
        raise FileFormatError(path, name, "is missing")
    value = metadata[name]
    found = type(value).__name__
    if kind is GGUFValueType.ARRAY:
        items = cast(list[Any], value) if isinstance(value, list) else None
        if items is None or not all(isinstance(v, bool) for v in items):
            raise FileFormatError(path, name, f"expected an array of bool, found {found}")
        return tuple(items)
    wanted = int if kind is GGUFValueType.UINT32 else float
    if type(value) is not wanted:
        raise FileFormatError(path, name, f"expected {wanted.__name__}, found {found}")
    if not 0 < value <= limit:  # also refuses NaN
        raise FileFormatError(path, name, f"expected more than 0 and at most {limit:g}, found {value}")
    return value


def inconsistencies(hp: Hyperparameters) -> Iterator[tuple[str, str]]:
    """Yield (field, problem) for each field of `hp` that contradicts another."""
    if len(hp.recurrent) != hp.layers:
        yield "recurrent", f"expected {hp.layers} entries, one a layer, found {len(hp.recurrent)}"
    if hp.heads % hp.kv_heads:
        yield "kv_heads", f"{hp.heads} query heads are no multiple of {hp.kv_heads} key/value heads"
    if hp.lru_width % hp.gate_blocks:
        yield "gate_blocks", f"{hp.gate_blocks} gate blocks do not divide the RG-LRU width {hp.lru_width}"
    if hp.rope_width % 2 or hp.rope_width > hp.head_width:
        yield "rope_width", f"expected an even number up to the head width {hp.head_width}, found {hp.rope_width}"
    if hp.conv_taps < 2:
        yield "conv_taps", f"expected at least 2 taps, found {hp.conv_taps}"
