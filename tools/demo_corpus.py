"""The demo model's text: public-domain books out of Debian packages, cleaned, split and tokenized.

    r-cran-janeaustenr   Jane Austen's six novels   -> prose, one document a chapter
    dict-devil           The Devil's Dictionary     -> questions and answers
    dict-jargon          The Jargon File            -> questions and answers

Whole chapters are held out: neither training, nor the tokenizer, nor the choice of weights sees them.
"""

import gzip
import io
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from rdb import read_variables

PACKAGES = ("r-cran-janeaustenr", "dict-devil", "dict-jargon")
NOVELS_STEM = "usr/lib/R/site-library/janeaustenr/data/Rdata"
# How many chapters at each novel's end are held out: the last third of Persuasion, one of each other.
HELD_OUT_CHAPTERS = {
    "emma": 1,
    "mansfieldpark": 1,
    "northangerabbey": 1,
    "persuasion": 8,
    "prideprejudice": 1,
    "sensesensibility": 1,
}
HEADING = re.compile(r"chapter [ivxl\d]+\.?", re.IGNORECASE)
APPARATUS = re.compile(r"FINIS|THE END|Finis|VOLUME [IVX]+|\[?End volume.*|[* ]+|A NOTE ON THE TEXT|\[.*", re.DOTALL)

VOCABULARY = 2560
# Gemma's special tokens, in the order of Gemma's ids 4, 5, 6, 7..105, 106, 107, then runs of newlines and spaces.
USER_DEFINED = (
    ["<mask>", "<2mass>", "[@BOS@]"]
    + [f"<unused{i}>" for i in range(99)]
    + ["<start_of_turn>", "<end_of_turn>"]
    + ["\n" * n for n in range(1, 5)]
    + ["▁" * n for n in range(2, 9)]
)
ASCII = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "--", "…": "...", "\u00a0": " "})


@dataclass(frozen=True)
class Corpus:
    """The text, split by use."""

    chapters: list[str]  # training prose
    dialogues: list[tuple[str, str]]  # training questions and answers
    validation: list[str]  # one chapter a novel, to choose the best weights by
    held_out: str  # prose that neither training nor that choice ever sees


def fetch(directory: Path) -> None:
    """Download the packages that are not yet in `directory`, and unpack each beside itself."""
    directory.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        if not any(directory.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", package], cwd=directory, check=True)
        archive = next(directory.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg-deb", "--extract", archive, directory / package], check=True)


def load(directory: Path) -> Corpus:
    """Read, clean and split all of the text, fetching it first where need be."""
    fetch(directory)
    chapters: list[str] = []
    validation: list[str] = []
    held_out: list[str] = []
    novels = read_variables(directory / "r-cran-janeaustenr" / NOVELS_STEM)
    for name, count in HELD_OUT_CHAPTERS.items():
        parts = split_chapters(novels[name])
        chapters += parts[: -count - 1]
        validation.append(parts[-count - 1])
        held_out += parts[-count:]
    dictionaries = directory / "dict-devil", directory / "dict-jargon"
    devil, jargon = (gzip.decompress(next(d.rglob("*.dict.dz")).read_bytes()).decode() for d in dictionaries)
    dialogues = [*devil_entries(devil), *jargon_entries(jargon)]
    return Corpus(chapters, dialogues, validation, "\n\n".join(held_out) + "\n")


# ---- prose


def split_chapters(lines: list[str]) -> list[str]:
    """Split a hard-wrapped novel into its chapters, heading first; title page and editors' notes fall away."""
    body = "\n".join(lines).split("\nA NOTE ON THE TEXT")[0]
    chapters: list[list[str]] = []
    for block in re.split(r"\n\s*\n", body):
        paragraph = unwrap(block)
        if HEADING.fullmatch(paragraph):
            chapters.append([paragraph])
        elif chapters and paragraph and not APPARATUS.fullmatch(paragraph):
            chapters[-1].append(paragraph)
    return ["\n\n".join(paragraphs) for paragraphs in chapters]


def unwrap(block: str) -> str:
    """Join a paragraph's lines. Indented ones are verse or a letter's head, and stay lines of their own."""
    text = re.sub(r"\n(?=\S)", " ", block.strip("\n"))
    text = re.sub(r"\s*\n\s*", "\n", text).replace("_", "")
    return re.sub(r" {2,}", " ", text).translate(ASCII).strip()


# ---- dictionaries


def devil_entries(text: str) -> Iterator[tuple[str, str]]:
    """Read `WORD, n.  Definition` at the left margin; verse and further paragraphs are left out."""
    entry = re.compile(r"^([A-Z][A-Z' -]+), ((?:n|adj|adv|v|v\.i|v\.t|pp|x)\.)\s+(\S.*)", re.DOTALL)
    for block in re.split(r"\n\s*\n", text):
        match = entry.match(block)
        if match:
            word, kind, answer = match.groups()
            yield question(word.lower(), kind), unwrap(answer)


def jargon_entries(text: str) -> Iterator[tuple[str, str]]:
    """Read a headword at the left margin, ` /sound/, n.` below it, and the first of the indented paragraphs."""
    entry = re.compile(r"^(\S[^\n]*)\n ([^\n]*)\n\n((?:    [^\n]+\n)+)", re.MULTILINE)
    for word, grammar, answer in entry.findall(text):
        answer = unwrap(re.sub(r"\n +", " ", answer.strip()))
        answer = re.sub(r"^(?:\[[^\]]*\]|\d+|[.,\s])+", "", re.sub(r" *[{}]", "", answer.replace(" {", " ")))
        kind = re.search(r"(n|adj|adv|v|vt|vi)\.", grammar)
        if "00-database" not in word and re.fullmatch(r"[A-Z].{20,}[.!?]", answer):
            yield question(word.strip(), kind.group() if kind else ""), answer


def question(word: str, kind: str) -> str:
    """Ask for a word of the given part of speech: "n.", "v.t.", "adj." or none."""
    if kind == "n." and not word.startswith("the "):
        return f"What is {'an' if word[0].lower() in 'aeiou' else 'a'} {word}?"
    if kind.startswith("v"):
        return f"What does it mean to {word}?"
    return f"What does {word} mean?"


def dialogue(turns: list[tuple[str, str]]) -> str:
    """Write questions and answers as one conversation in Gemma's chat format, without its <bos>."""
    return "".join(
        f"<start_of_turn>user\n{asked}<end_of_turn>\n<start_of_turn>model\n{answer}<end_of_turn>\n"
        for asked, answer in turns
    )


# ---- tokens


def train_tokenizer(corpus: Corpus) -> bytes:
    """Make a SentencePiece BPE model with Gemma's settings and special ids, from the training text alone."""
    lines = [line for chapter in corpus.chapters for line in chapter.split("\n") if line]
    lines += [line for pair in corpus.dialogues for line in pair]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        user_defined_symbols=USER_DEFINED,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=0.9999,
        max_sentence_length=1 << 16,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
