"""adapter_config.json -> `AdapterConfig`: by which number each of an adapter's products is multiplied.

Fields and their meaning follow PEFT 0.21 (tuners/lora/config.py). Each is read, or is listed here as one that
changes no merged weight, or as one that changes them in a way we do not have: that one must be empty.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from griffin_gguf.convert.files import Fields, read_json
from griffin_gguf.runtime.errors import FileFormatError, UnsupportedError

CONFIG = "adapter_config.json"
MAX_RANK = 4096  # one of a tensor's two factors is held whole: at this rank and 12,288 columns, 192 MiB

#: Fields that `read_adapter_config` uses.
USED = frozenset({
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias",
    "modules_to_save", "bias", "fan_in_fan_out", "init_lora_weights",
})  # fmt: skip

#: Fields that change no merged weight -> why.
IGNORED: dict[str, str] = {
    **dict.fromkeys(("base_model_name_or_path", "revision", "peft_version", "auto_mapping"), "provenance"),
    **dict.fromkeys(("task_type", "inference_mode", "lora_dropout", "runtime_config", "merge_weights"), "training"),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
                    "the tensors themselves name their modules"),
    **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config"), "used by init_lora_weights only"),
    "ensure_weight_tying": "head and embedding are both in the file then",
    "megatron_core": "used with megatron_config only",
    "qalora_group_size": "used with use_qalora only",
}  # fmt: skip

#: Fields that must be null, false or empty -> what they ask for otherwise.
UNSUPPORTED: dict[str, str] = {
    "layer_replication": "layers used several times",
    "target_parameters": "LoRA of parameters that are no module's weight",
    "trainable_token_indices": "single rows of the embedding",
    "megatron_config": "Megatron's parallel layers",
    "enable_lora": "LoRA of fused projections",
    "alora_invocation_tokens": "aLoRA, which is off until certain tokens appear,",
    "arrow_config": "a router of adapters",
    "kasa_config": "KaSA, which cuts the base's weights,",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QALoRA",
}

#: Ways to begin that leave the base as it is; the others (pissa, olora, corda, loftq, ...) take their start out of it.
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_BIASES = (None, "none", "all", "lora_only")

#: Bounds of patterns; without them one of a few bytes could keep `re` busy for years.
_MAX_PATTERNS, _MAX_LENGTH, _MAX_REPEATS, _MAX_GROUPS, _MAX_CHOICES = 10_000, 1000, 3, 3, 64

#: Patterns of modules' names, each with what it says of the modules that it matches.
Patterns = tuple[tuple[re.Pattern[str], float], ...]


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter_config.json says; `ranks` and `alphas` are its patterns, in order.

    `dora` and `lora_bias` tell which tensors must be there beside the two factors; `saved` are the ends of the
    names of modules that the adapter holds copies of.
    """

    path: Path
    rank: int
    alpha: float
    rank_stabilized: bool
    ranks: Patterns
    alphas: Patterns
    dora: bool
    lora_bias: bool
    saved: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        """r of one module."""
        return int(_first(self.ranks, module, self.rank))

    def scale_of(self, module: str) -> float:
        """What the product of a module's factors is multiplied by: alpha/r, or alpha/sqrt(r) where rank-stabilized."""
        rank = self.rank_of(module)
        return _first(self.alphas, module, self.alpha) / (sqrt(rank) if self.rank_stabilized else rank)

    def saves(self, module: str) -> bool:
        """Whether the adapter has a copy of its own of this module, by PEFT's rule."""
        return any(module.endswith(end) for end in self.saved)


def read_adapter_config(path: Path, allow_unknown: bool = False) -> AdapterConfig:
    """Read and check an adapter_config.json.

    Raises `FileFormatError` for a field that is missing, of the wrong type or out of bounds and, unless
    `allow_unknown`, for one that nothing here knows; `UnsupportedError` for what cannot be merged.
    """
    fields = Fields(path, read_json(path))
    _check_variant(fields)
    fields.check_known(allow_unknown, USED, IGNORED, UNSUPPORTED)
    return AdapterConfig(
        path,
        rank=_rank(path, "r", fields.whole("r")),
        alpha=_alpha(path, "lora_alpha", fields.number("lora_alpha")),
        rank_stabilized=fields.flag("use_rslora", False),
        ranks=_patterns(fields, "rank_pattern", lambda inner, key: _rank(path, "rank_pattern", inner.whole(key))),
        alphas=_patterns(fields, "alpha_pattern", lambda inner, key: _alpha(path, "alpha_pattern", inner.number(key))),
        dora=fields.flag("use_dora", False),
        lora_bias=fields.flag("lora_bias", False),
        saved=_saved(fields),
    )


def _check_variant(fields: Fields) -> None:
    """Refuse other methods, and variants of this one that cannot be merged."""
    path = fields.path
    found = fields.values.get("peft_type")
    if found != "LORA":
        raise UnsupportedError(f"{path}: peft_type: only 'LORA' can be merged, found {found!r}")
    for name, what in UNSUPPORTED.items():
        if fields.values.get(name) not in (None, False, [], {}):
            raise UnsupportedError(f"{path}: {name}: {what} cannot be merged; only an empty value can")
    beginning, bias = fields.values.get("init_lora_weights"), fields.values.get("bias")
    if beginning not in _PLAIN_BEGINNINGS:
        advice = "save the adapter as plain LoRA first (PEFT: path_initial_model_for_weight_conversion)"
        raise UnsupportedError(f"{path}: init_lora_weights: {beginning!r} changes the base's weights; {advice}")
    if bias not in _BIASES:
        raise UnsupportedError(f"{path}: bias: expected one of {', '.join(_BIASES[1:])}, found {bias!r}")
    if fields.flag("fan_in_fan_out", False):
        raise UnsupportedError(f"{path}: fan_in_fan_out: only false fits this model's layers")
    if fields.flag("use_dora", False) and fields.flag("lora_bias", False):
        raise UnsupportedError(f"{path}: use_dora: PEFT has none with lora_bias = true")


def _rank(path: Path, field: str, value: int) -> int:
    if not 0 < value <= MAX_RANK:
        raise FileFormatError(path, field, f"expected a rank from 1 to {MAX_RANK}, found {value}")
    return value


def _alpha(path: Path, field: str, value: float) -> float:
    if not isfinite(value):
        raise FileFormatError(path, field, f"expected a finite number, found {value}")
    return value


def _saved(fields: Fields) -> tuple[str, ...]:
    value: Any = fields.values.get("modules_to_save") or []
    if not isinstance(value, list) or not all(isinstance(end, str) for end in value):
        raise FileFormatError(fields.path, "modules_to_save", f"expected a list of names, found {value!r}")
    return tuple(value)


def _patterns(fields: Fields, name: str, read: Callable[[Fields, str], float]) -> Patterns:
    """One of the two pattern fields, compiled as PEFT does: each is for the end of a module's name, from a dot on."""
    value: Any = fields.values.get(name) or {}
    if not isinstance(value, dict) or len(value) > _MAX_PATTERNS:
        raise FileFormatError(fields.path, name, f"expected an object of at most {_MAX_PATTERNS} patterns")
    inner, found = Fields(fields.path, value), list[tuple[re.Pattern[str], float]]()
    for key in value:
        try:
            if not _is_bounded(key):
                raise UnsupportedError(f"{fields.path}: {name}: {key[:100]!r} is too intricate a pattern")
            found.append((re.compile(rf"(.*\.)?({key})$"), read(inner, key)))
        except (re.error, OverflowError) as error:
            raise FileFormatError(fields.path, name, f"{key!r} is no pattern: {error}") from None
    return tuple(found)


def _is_bounded(pattern: str) -> bool:
    """Whether a pattern cannot backtrack more than some ten thousand times over a module's name."""
    repeats = sum(pattern.count(sign) for sign in "*+?{")
    few = repeats <= _MAX_REPEATS and pattern.count("(") <= _MAX_GROUPS and pattern.count("|") <= _MAX_CHOICES
    return few and 0 < len(pattern) <= _MAX_LENGTH and not re.search(r"\)[*+{]", pattern)


def _first(patterns: Patterns, module: str, default: float) -> float:
    """What the first pattern that matches says."""
    return next((value for pattern, value in patterns if pattern.match(module)), default)
