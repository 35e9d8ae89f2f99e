"""What Ollama asks of a GGUF, as one table: what its decoder refuses, and what it reads otherwise than it is meant.

Ollama reads keys by their exact type: where another is found, it takes a default and says nothing. So a file can be
sound, and a model of it still be shown, scheduled or prompted wrongly. `odd` rules are those that a file may break on
purpose.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGUFValueType, LlamaFileType
from gguf import GGUFValueType as V

from griffin_gguf.quant.gguf_outline import Outline, Tensor, read_outline
from griffin_gguf.runtime.gguf_header import MAGIC

MAX_STRING = 16 << 20  # bytes
MAX_ARRAY = 64 << 20  # elements
MAX_DIMS = 4
MAX_COUNT = 2**63 - 1  # of elements, and of bytes

#: By its distance from this text Ollama knows Gemma's turns, and sets the model's stops.
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
FAR = 100  # edits, from where on it is another template

_BLOCKS = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}

Check = Callable[[Outline], Iterator[tuple[str, str]]]


@dataclass(frozen=True)
class Rule:
    """One row: what is expected, and a check that yields (field, what was found) wherever it is not so."""

    name: str
    expected: str
    check: Check
    odd: bool = False


@dataclass(frozen=True)
class Findings:
    """Lines that name file, field, what was expected and found: rules `broken`, and those of the `odd` ones."""

    broken: list[str]
    odd: list[str]


def check_for_ollama(path: Path) -> Findings:
    """Hold the GGUF at `path` against every rule. Raises `FileFormatError` where it is no file or cannot be read."""
    outline = read_outline(path)
    broken, odd = list[str](), list[str]()
    for rule in RULES:
        for field, found in rule.check(outline):
            line = f"{path}: {field}: expected {rule.expected}, found {found}"
            (odd if rule.odd else broken).append(line)
        if broken and rule.name == "magic":
            break  # no other rule speaks of such a file
    return Findings(broken, odd)


# ---- the file


def _magic(outline: Outline) -> Iterator[tuple[str, str]]:
    if outline.magic != MAGIC:
        yield "magic", repr(outline.magic)


def _version(outline: Outline) -> Iterator[tuple[str, str]]:
    if outline.version not in (2, 3):
        yield "version", str(outline.version)


def _whole(outline: Outline) -> Iterator[tuple[str, str]]:
    if outline.stopped:
        yield "header", outline.stopped


def _strings(outline: Outline) -> Iterator[tuple[str, str]]:
    for name, key in outline.keys.items():
        if key.longest > MAX_STRING:
            yield name, f"one of {key.longest} bytes"
    if outline.longest_name > MAX_STRING:
        yield "names", f"one of {outline.longest_name} bytes"


def _arrays(outline: Outline) -> Iterator[tuple[str, str]]:
    for name, key in outline.keys.items():
        if key.count > MAX_ARRAY:
            yield name, f"{key.count} elements"


def _one_file(outline: Outline) -> Iterator[tuple[str, str]]:
    count = outline.value("split.count", V.UINT16)
    if count is not None and count > 1:
        yield "split.count", f"{count} files; griffin quantize makes them one"


def _alignment(outline: Outline) -> Iterator[tuple[str, str]]:
    key = outline.keys.get("general.alignment")
    if key is not None and (key.type != V.UINT32 or not key.value or key.value & (key.value - 1)):
        yield "general.alignment", _shown(key.type, key.value)


# ---- tensors


def _each(check: Callable[[Tensor], str | None]) -> Check:
    def rows(outline: Outline) -> Iterator[tuple[str, str]]:
        for tensor in outline.tensors:
            if found := check(tensor):
                yield tensor.name, found

    return rows


def _dims(tensor: Tensor) -> str | None:
    return None if 1 <= len(tensor.dims) <= MAX_DIMS else str(len(tensor.dims))


def _countable(tensor: Tensor) -> str | None:
    elements = _elements(tensor)
    return None if 1 <= elements <= MAX_COUNT and tensor.offset <= MAX_COUNT else f"dimensions {list(tensor.dims)}"


def _known(tensor: Tensor) -> str | None:
    return None if _block(tensor) else f"type {tensor.type}"


def _rows(tensor: Tensor) -> str | None:
    block = _block(tensor)
    fits = block is None or not tensor.dims or tensor.dims[0] % block[0] == 0
    return None if fits or block is None else f"rows of {tensor.dims[0]} elements in blocks of {block[0]}"


def _inside(outline: Outline) -> Iterator[tuple[str, str]]:
    for tensor in outline.tensors:
        block = _block(tensor)
        if outline.data is None or block is None or _countable(tensor):
            continue  # other rules say so
        end = outline.data + tensor.offset + _elements(tensor) // block[0] * block[1]
        if end > outline.size:
            yield tensor.name, f"{end}, past the {outline.size} of the file"


def _elements(tensor: Tensor) -> int:
    product = 1
    for n in tensor.dims:
        product *= n
    return product


def _block(tensor: Tensor) -> tuple[int, int] | None:
    """Elements and bytes of a block of the tensor's type; None for a type that ggml does not have."""
    return _BLOCKS.get(tensor.type)


# ---- keys


def _key(name: str, kind: V, holds: Callable[[Any], bool] = lambda value: True) -> Check:
    """A key that must be there, of exactly that type; `{arch}` in its name is the file's architecture."""

    def check(outline: Outline) -> Iterator[tuple[str, str]]:
        architecture = outline.value("general.architecture", V.STRING)
        if architecture is None and "{arch}" in name:
            return  # the rule of the architecture says so
        full = name.format(arch=architecture)
        key = outline.keys.get(full)
        if key is None:
            yield from _missing(outline, full)
        elif key.type != kind or not holds(key.value):
            yield full, _shown(key.type, key.value)

    return check


def _tokens(outline: Outline) -> Iterator[tuple[str, str]]:
    name = "tokenizer.ggml.tokens"
    key = outline.keys.get(name)
    if key is None:
        yield from _missing(outline, name)
    elif (key.type, key.element) != (V.ARRAY, V.STRING):
        yield name, _shown(key.type if key.element is None else key.element, key.value)


def _quantizable(outline: Outline) -> Iterator[tuple[str, str]]:
    if outline.value("general.file_type", V.UINT32) == LlamaFileType.ALL_F32:
        yield "general.file_type", "0 (F32), which Ollama takes for unknown"


def _template(outline: Outline) -> Iterator[tuple[str, str]]:
    name = "tokenizer.chat_template"
    key = outline.keys.get(name)
    if key is None:
        yield from _missing(outline, name, ": without a TEMPLATE in the Modelfile a prompt goes in as it is")
    elif key.type != V.STRING:
        yield name, _shown(key.type, None)
    elif not is_near(key.value or "", GEMMA, FAR):
        yield name, "another: without a TEMPLATE in the Modelfile Ollama may not set the stops"


def _missing(outline: Outline, name: str, so: str = "") -> Iterator[tuple[str, str]]:
    """That there is no such key, of a header that was read to its end."""
    if outline.stopped is None:
        yield name, "none" + so


def _shown(kind: int, value: Any) -> str:
    """A value's type, and the value where it was kept."""
    name = GGUFValueType(kind).name if kind in set(GGUFValueType) else str(kind)
    return name if value is None or value == "" else f"{name} {str(value)[:60]!r}"


def is_near(a: str, b: str, far: int) -> bool:
    """Whether fewer than `far` edits of single characters make `b` of `a` (Levenshtein's distance)."""
    if abs(len(a) - len(b)) >= far:
        return False
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[same:], b[same:]
    before = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        now = [i]
        for j, y in enumerate(b, 1):
            now.append(min(before[j] + 1, now[-1] + 1, before[j - 1] + (x != y)))
        before = now
    return before[-1] < far


_ARCHITECTURE_NUMBERS = ("block_count", "embedding_length", "context_length", "attention.head_count",
                         "attention.head_count_kv")  # fmt: skip

#: Every rule of Ollama's, in the order in which findings are told.
RULES: tuple[Rule, ...] = (
    Rule("magic", repr(MAGIC), _magic),
    Rule("version", "2 or 3", _version),
    Rule("header", "all that it counts", _whole),
    Rule("strings", f"none longer than {MAX_STRING} bytes", _strings),
    Rule("arrays", f"none of more than {MAX_ARRAY} elements", _arrays),
    Rule("one file", "one file", _one_file),
    Rule("alignment", "UINT32, a power of 2", _alignment),
    Rule("dimensions", f"1 to {MAX_DIMS} dimensions", _each(_dims)),
    Rule("overflow", "a number of elements that 63 bits can count", _each(_countable)),
    Rule("tensor type", "a type that ggml has", _each(_known)),
    Rule("rows", "rows of whole blocks", _each(_rows)),
    Rule("inside the file", "an end within the file", _inside),
    Rule("architecture", "STRING", _key("general.architecture", V.STRING)),
    Rule("kind", "STRING 'model'", _key("general.type", V.STRING, lambda value: value == "model")),
    Rule("file type", "UINT32, a number of llama.cpp's",
         _key("general.file_type", V.UINT32, lambda value: value in set(LlamaFileType))),
    *(Rule(name, "UINT32, above 0", _key("{arch}." + name, V.UINT32, lambda value: value > 0))
      for name in _ARCHITECTURE_NUMBERS),
    Rule("tokenizer", "STRING", _key("tokenizer.ggml.model", V.STRING)),
    Rule("pre-tokenizer", "STRING", _key("tokenizer.ggml.pre", V.STRING)),
    Rule("tokens", "an array of STRING", _tokens),
    Rule("BOS", "BOOL", _key("tokenizer.ggml.add_bos_token", V.BOOL)),
    Rule("quantizable", "F16 or BF16 where ollama create -q is to quantize it", _quantizable, odd=True),
    Rule("chat template", "Gemma's", _template, odd=True),
)  # fmt: skip
