import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from local_tasks import NAMES, local_tasks
from rewriting import rewritten
from transformers import AutoTokenizer

import griffin_gguf.cli
from griffin_gguf.convert.pipeline import convert
from griffin_gguf.quant import tasks as tasks_module
from griffin_gguf.quant.evaluate import perplexity
from griffin_gguf.quant.harness import GriffinLM, Order
from griffin_gguf.quant.tasks import load_tasks, run
from griffin_gguf.runtime import Model, load
from griffin_gguf.runtime.chat import stop_tokens
from griffin_gguf.runtime.errors import GriffinError, UnsupportedError
from griffin_gguf.runtime.generate import generate
from griffin_gguf.runtime.sampling import Sampling

DEMO = Path(griffin_gguf.cli.__file__).with_name("demo_model")
HELD_OUT = DEMO / "heldout.txt"
CONTEXT = "It was a fine morning in May, and Elizabeth"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("harness") / "demo-F32.gguf"
    convert(DEMO, [(target, "F32")])
    return target


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with load(path, backend="ggml", threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return local_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Of torch: the machine may have others' work to do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def asked(kind: Any, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0, ("made_up", 7, 1))


def endings(*pairs: tuple[str, str]) -> list[Instance]:
    return [asked("loglikelihood", *pair) for pair in pairs]


def by_definition(model: Model, before: Sequence[int], after: Sequence[int]) -> tuple[float, bool]:
    """The sum of log-probabilities out of one forward pass over everything."""
    logits = model.forward([*before, *after], model.new_state(), every=True).astype(np.float64)
    rows = logits[len(before) - 1 : -1]
    chances = np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True)
    return np.log(chances[np.arange(len(after)), after]).sum(), bool((rows.argmax(axis=1) == after).all())


# Every way in which a text may part, and texts that begin alike.
PAIRS = (
    (CONTEXT, " was not so much in the world"),  # the greedy continuation
    (CONTEXT, " was not at all in the world"),
    (CONTEXT, " was"),
    (CONTEXT, " was"),
    (CONTEXT, "'s father; but <eos> is no end"),
    (CONTEXT + " was not", " so"),
    (CONTEXT + " was not ", "so"),  # the space goes to the continuation
    (CONTEXT + "  ", "x"),
    ("Emma", " Woodhouse"),
    ("", "Emma Woodhouse"),
    ("", "£2,000 — a year"),
    ("   ", "Emma"),
)


@pytest.mark.parametrize("batch", [1, 8])
def test_loglikelihood_by_its_definition(model: Model, batch: int) -> None:
    lm = GriffinLM(model, batch)
    encode = model.tokenizer.encode
    for (context, continuation), found in zip(PAIRS, lm.loglikelihood(endings(*PAIRS)), strict=True):
        stripped = context.rstrip()
        before = encode(stripped)  # BOS alone where nothing is left
        whole = encode(context + continuation)
        wanted = by_definition(model, before, whole[len(before) :])
        assert found == (pytest.approx(wanted[0], abs=1e-4), wanted[1]), (context, continuation)
    assert lm.loglikelihood(endings(PAIRS[0]))[0][1] is True
    assert lm.loglikelihood(endings(PAIRS[1]))[0][1] is False


def test_what_requests_have_in_common_is_read_once(model: Model) -> None:
    lm, encode = GriffinLM(model, 4), model.tokenizer.encode
    lm.loglikelihood(endings(*PAIRS))
    # The last token of a text is predicted, not read.
    texts = [encode(context + continuation)[:-1] for context, continuation in PAIRS]
    assert lm.tokens_asked == sum(map(len, texts))
    assert lm.tokens_read == len({tuple(text[:n]) for text in texts for n in range(1, len(text) + 1)})
    examples = "Question and answer. " * 20
    prompts = [f"{examples}{last}" for last in ("One", "Two", "Three", "Two")]
    before = lm.tokens_read
    lm.generate_until([asked("generate_until", prompt, {"until": ["\n"], "max_gen_toks": 2}) for prompt in prompts])
    texts = [encode(prompt) for prompt in prompts]
    assert lm.tokens_read - before == len({tuple(text[:n]) for text in texts for n in range(1, len(text) + 1)})
    assert lm.tokens_read - before < len(texts[0]) + 12


def test_a_text_of_any_length_is_one_text(model: Model) -> None:
    long, short = HELD_OUT.read_text(encoding="utf-8")[:12000], "Emma."
    found = GriffinLM(model).loglikelihood_rolling(
        [asked("loglikelihood_rolling", text) for text in (long, "", short, long[:6000])]
    )
    for text, total in zip((long, short, long[:6000]), (found[0], *found[2:]), strict=True):
        ids = model.tokenizer.encode(text)
        wanted = perplexity(model, ids)
        assert total == pytest.approx(-wanted.nll * (len(ids) - 1), rel=1e-6)
    assert len(model.tokenizer.encode(long)) > 3 * 1024  # three times the rows of the training
    assert found[1] == 0.0


@pytest.mark.parametrize("batch", [1, 3])
def test_answers_are_those_of_generate(model: Model, batch: int) -> None:
    prompts = (CONTEXT, CONTEXT, CONTEXT + " was not", "What is a year?\n", "", "Emma")
    until = [["."], [" so", "."], [], ["\n"], ["the", "a"], "e"]
    sizes = (40, 40, 12, 25, 9, 0)
    found = GriffinLM(model, batch).generate_until(
        [
            asked("generate_until", prompt, {"until": stops, "max_gen_toks": size})
            for prompt, stops, size in zip(prompts, until, sizes, strict=True)
        ]
    )
    ends = stop_tokens(model.file.metadata, model.tokenizer)
    for prompt, stops, size, text in zip(prompts, until, sizes, found, strict=True):
        ids = model.tokenizer.encode(prompt)
        answer = generate(model, model.new_state(), ids, Sampling(0.0), size, ends, stops)
        assert text == "".join(answer), prompt
    assert found[1] == found[0].split(" so")[0] != found[0]
    assert found[5] == ""


def test_an_answer_ends_with_a_stop_token(model: Model) -> None:
    lm = GriffinLM(model, chat=True)
    context = lm.apply_chat_template([{"role": "user", "content": "What is a cynic?"}])
    (answer,) = lm.generate_until([asked("generate_until", context, {"until": []})])  # by itself, as its page shows
    assert answer == "A person who has a bogus of a bigher."


def test_drawn_answers_are_the_same_every_time(model: Model) -> None:
    settings = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5, "top_k": 40, "top_p": 0.9}
    requests = [asked("generate_until", CONTEXT, settings)] * 3
    first, again = (GriffinLM(model, batch).generate_until(requests) for batch in (3, 2))
    assert first == again
    assert len(set(first)) == 3  # repeats of one request differ


def test_how_tasks_ask_for_answers() -> None:
    assert Order.of("t", {"until": "x", "temperature": 0.7}, 5) == Order(Sampling(0.7, 0, 1.0, seed=5), 256, ("x",))
    assert Order.of("t", {"until": ["x", ""], "max_new_tokens": 3, "do_sample": False, "num_beams": 1}, 5) == Order(
        Sampling(0.0), 3, ("x",)
    )
    for unknown in ({"num_beams": 4}, {"repetition_penalty": 2.0}):
        with pytest.raises(UnsupportedError, match=r"task t: generation_kwargs: expected until, .*, found "):
            Order.of("t", {"until": [], **unknown}, 0)


def test_only_chats_write_control_tokens(model: Model) -> None:
    tokens = model.tokenizer
    turn, eos = tokens.control_tokens["<end_of_turn>"], tokens.eos
    assert not {turn, eos} & set(GriffinLM(model).tok_encode("x<end_of_turn><eos>"))
    lm = GriffinLM(model, chat=True)
    text = lm.apply_chat_template([{"role": "user", "content": "Say <end_of_turn> and <eos>."}])
    ids = lm.tok_encode(text)
    assert ids[0] == tokens.bos
    assert ids.count(tokens.bos) == 1
    assert ids.count(turn) == 1
    assert eos not in ids
    (plain,) = lm.loglikelihood(endings((text, "<eos>")))
    assert plain[0] == pytest.approx(by_definition(model, ids, tokens.encode("<eos>", bos=False))[0], rel=1e-4)


def test_chat_templates_as_transformers_applies_them(model: Model) -> None:
    lm, theirs = GriffinLM(model, chat=True), AutoTokenizer.from_pretrained(DEMO)
    turns = [
        {"role": "user", "content": "What is a bore?"},
        {"role": "assistant", "content": "A person who talks."},
        {"role": "user", "content": " What is a year? "},
    ]
    begun = [*turns, {"role": "assistant", "content": "A period of"}]
    assert lm.apply_chat_template(turns) == theirs.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == theirs.apply_chat_template(
        begun, tokenize=False, continue_final_message=True
    )
    assert lm.chat_template(True) == theirs.chat_template
    assert lm.chat_template(False) is None
    assert not lm.system_refused


def test_a_template_without_system_messages_goes_without(model: Model) -> None:
    lm, question = GriffinLM(model, chat=True), {"role": "user", "content": "What is a year?"}
    for _ in range(2):
        assert lm.apply_chat_template([{"role": "system", "content": "Be brief."}, question]) == lm.apply_chat_template(
            [question]
        )
        assert lm.system_refused
    with pytest.raises(GriffinError, match="the chat template refuses them: Conversation roles must alternate"):
        lm.apply_chat_template([{"role": "system", "content": "Be brief."}, question, question])


def test_what_cannot_be_is_refused(path: Path, model: Model, tmp_path: Path) -> None:
    for batch in (0, model.chunk + 1):
        with pytest.raises(UnsupportedError, match=f"batch: expected 1 to {model.chunk}, found {batch}"):
            GriffinLM(model, batch)
    bare = rewritten(path, tmp_path / "bare.gguf", tokenizer__chat_template=None)
    with load(bare, backend="ggml", threads=1) as plain:
        assert GriffinLM(plain).chat_template(True) is None
        with pytest.raises(UnsupportedError, match=r"bare\.gguf: tokenizer\.chat_template: is missing"):
            GriffinLM(plain, chat=True)
    lm = GriffinLM(model)
    for pair in ((CONTEXT, ""), ("", "")):
        with pytest.raises(GriffinError, match="made_up: document 7: the continuation '' adds no token"):
            lm.loglikelihood(endings(("Emma", " was"), pair))
    assert lm.tokens_read == 0


def test_logits_that_are_no_numbers_are_no_score(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        model, "forward_batch", lambda batch, every: [np.full((1, model.hp.vocab), np.nan, np.float32)] * len(batch)
    )
    with pytest.raises(GriffinError, match="tokens 1 to 1: the model's logits hold NaN or infinity"):
        GriffinLM(model).loglikelihood_rolling([asked("loglikelihood_rolling", "Emma")])


def transformers_results(folder: Path, names: Sequence[str], chat: bool, **options: Any) -> Any:
    """lm-eval's own account of the checkpoint, run by transformers in float32."""
    make: Any = HFLM  # whose decorator hides what it takes
    return simple_evaluate(
        model=make(pretrained=str(DEMO), dtype="float32", device="cpu", batch_size=1, **options),
        tasks=list(names),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        num_fewshot=1,
        limit=2,
        bootstrap_iters=tasks_module.DRAWS,
        apply_chat_template=chat,
        log_samples=True,
    )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("chat", [False, True])
def test_all_tasks_score_as_with_transformers(
    model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    tasks = load_tasks(NAMES, [folder])
    found = run(GriffinLM(model, 4, chat), tasks, shots=1, limit=2, chat=chat)
    others = [name for name in NAMES if name != "local_passages"]
    wanted = transformers_results(folder, others, chat)
    # Of whole texts lm-eval's class predicts a BOS after a BOS, unless it is told not to add any.
    whole = transformers_results(folder, ["local_passages"], chat, add_bos_token=False)
    wanted["results"] |= whole["results"]
    wanted["samples"] |= whole["samples"]
    for outcome in found.outcomes:
        key = f"{outcome.metric},{outcome.filter}"
        theirs = wanted["results"][outcome.task]
        assert outcome.value == pytest.approx(theirs[key], rel=1e-5), outcome
        error = theirs[f"{outcome.metric}_stderr,{outcome.filter}"]
        assert outcome.stderr == (None if error == "N/A" else pytest.approx(error, rel=1e-4)), outcome
    for name, task in tasks.tasks.items():
        samples = wanted["samples"][name]  # once for every filter
        answers = [r for sample in samples if sample["filter"] == samples[0]["filter"] for r in sample["resps"]]
        assert len(answers) == len(task.instances)
        for instance, answer in zip(task.instances, answers, strict=True):
            assert _near(instance.resps, answer), (name, instance.args)


def _near(one: Any, other: Any) -> bool:
    """Equal, numbers but for rounding."""
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_near, one, other))
    return math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-4) if isinstance(one, float) else one == other
