"""A Griffin as lm-evaluation-harness sees a model. Needs lm-eval: `pip install 'griffin-gguf[eval]'`.

Where a text parts into context and continuation is lm-eval's own affair (`TemplateLM._encode_pair`), so that scores
compare with those of other models. What differs is how texts are read: none is too long for a state, and what several
requests have in common, a few examples or a question with its four endings, is read once (`prefixes.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from numpy.typing import NDArray

from griffin_gguf.quant.prefixes import Progress, Reached, Reading
from griffin_gguf.runtime.chat import ChatTemplate, stop_tokens
from griffin_gguf.runtime.engine import Engine, Request
from griffin_gguf.runtime.errors import FileFormatError, GriffinError, UnsupportedError
from griffin_gguf.runtime.model import Model
from griffin_gguf.runtime.sampling import Sampling
from griffin_gguf.runtime.state import State

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

#: Shows how far a job of that name is, counted in that unit, while its block runs.
Meter = Callable[[str, str], AbstractContextManager[Progress]]

Pair = tuple[list[int], list[int]]  # tokens of a context and of its continuation, at least one each
Score = tuple[float, bool]  # the continuation's log-likelihood in nats; whether all of it is what greedy decoding gives

#: Where a task does not say when an answer ends at the latest: as other models of lm-eval do.
ANSWER_TOKENS = 256

_SEED = 1234  # lm-eval's; an answer that is drawn, not greedy, has this seed plus its request's index
_DRAWING = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}  # settings of tasks that `Sampling` has too


def _silent(label: str, unit: str) -> AbstractContextManager[Progress]:
    return nullcontext(lambda done, total: None)


class GriffinLM(TemplateLM):
    """`model` behind lm-eval's interface, `batch` texts at a time.

    `tokens_asked` counts what the requests so far would have had read one by one, `tokens_read` what was read, both
    without the tokens of answers. With `chat` contexts are conversations, made by `apply_chat_template`. Raises
    `UnsupportedError` for a `batch` beyond the model's chunk, and with `chat` for a file without a template.
    """

    def __init__(self, model: Model, batch: int = 8, chat: bool = False, meter: Meter = _silent) -> None:
        super().__init__()
        if not 1 <= batch <= model.chunk:
            raise UnsupportedError(f"batch: expected 1 to {model.chunk}, found {batch}")
        self._model, self._batch, self._chat, self._meter = model, batch, chat, meter
        self._tokens = model.tokenizer
        self._template = ChatTemplate.from_gguf(model.path, model.file.metadata)
        if chat and self._template is None:
            raise UnsupportedError(f"{model.path}: tokenizer.chat_template: is missing; expected one to apply")
        self.system_refused = False  # the template takes no system messages, and those of the tasks were left out
        self.tokens_asked = self.tokens_read = 0

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._tokens.eos

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context: BOS, with which every text began in training."""
        return self._tokens.bos

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer and its template in lm-eval's caches of requests."""
        return self._model.path.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The file's template, for lm-eval's records."""
        return self._template.template if self._template and chat_template else None

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, BOS before them unless `add_special_tokens` is False; only chats write control tokens."""
        return self._tokens.encode(string, bos=add_special_tokens is not False, special=self._chat)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as a text that ends where the model's answer begins.

        Without `add_generation_prompt` the last message is how that answer begins. A template that refuses system
        messages (Gemma's does) gets the conversation without them, as it would from lm-eval's own classes;
        `system_refused` tells. Other refusals are raised, as of `ChatTemplate.render`.
        """
        messages = [{**message, "content": self._plain(message["content"])} for message in chat_history]
        begun = "" if add_generation_prompt else messages.pop()["content"]
        return self._rendered(messages) + begun

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        assert self._template, "checked where chats are asked for"
        others = [message for message in messages if message["role"] != "system"]
        if self.system_refused or len(others) == len(messages):
            return self._template.render(others)
        try:
            return self._template.render(messages)
        except FileFormatError:
            raise
        except GriffinError:
            text = self._template.render(others)
            self.system_refused = True
            return text

    def _plain(self, text: str) -> str:
        """`text` so that no control token comes out where it is encoded."""
        return self._tokens.shield(text) if self._chat else text

    def loglikelihood(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[Score]:
        """Of every request (context, continuation). Raises `GriffinError` for a continuation of no tokens."""
        return self._loglikelihood_tokens([(_arguments(request), *self._pair(request)) for request in requests])

    def _pair(self, request: "Instance") -> Pair:
        context, continuation = _arguments(request)
        plain = self._plain(continuation)
        if context:
            before, after = self._encode_pair(context, plain)
        else:
            before, after = [], self.tok_encode(plain, add_special_tokens=False)
        if not after:
            where = f"{request.task_name}: document {request.doc_id}"
            raise GriffinError(f"{where}: the continuation {continuation!r} adds no token to its context")
        return before or [self.prefix_token_id], after

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any) -> list[Score]:
        return self._scores([(before, after) for _, before, after in requests], "Scoring")

    def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[float]:
        """Of every request (text,) as a whole after BOS: one pass with carried state, however long it is."""
        texts = [self.tok_encode(self._plain(_arguments(request)[0]), add_special_tokens=False) for request in requests]
        scores = iter(self._scores([([self.prefix_token_id], text) for text in texts if text], "Reading"))
        return [next(scores)[0] if text else 0.0 for text in texts]

    def _scores(self, pairs: Sequence[Pair], label: str) -> list[Score]:
        """The last token of a continuation need not be read: nothing is predicted after it."""
        texts = [np.asarray(before + after, np.int64) for before, after in pairs]
        contexts = [len(before) for before, _ in pairs]
        reading = Reading(self._model, [text[:-1] for text in texts], contexts, self._batch)
        sums, greedy = np.zeros(len(pairs)), np.ones(len(pairs), np.bool_)
        with self._meter(label, "tokens") as report:
            for reached in self._counted(reading):
                _add(reached, texts, contexts, sums, greedy)
                report(reading.read, reading.total)
        return [(float(total), bool(likeliest)) for total, likeliest in zip(sums, greedy, strict=True)]

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """The answer to every request (context, generation_kwargs), which ends before a stop string or a stop token.

        Raises `UnsupportedError` for a setting that is not known here, before anything is read.
        """
        prompts = [self.tok_encode(_arguments(request)[0]) for request in requests]
        orders = [Order.of(str(r.task_name), _arguments(r)[1], _SEED + i) for i, r in enumerate(requests)]
        ends = stop_tokens(self._model.file.metadata, self._tokens)
        engine, states = Engine(self._model, self._batch), self._states(prompts)
        answers, running = dict[int, str](), dict[int, Request]()
        with self._meter("Answering", "answers") as report:
            while len(answers) < len(requests):
                for i, state in islice(states, self._batch - len(running)):
                    order = orders[i]
                    running[i] = engine.submit((), order.sampling, order.most, ends, order.until, state)
                engine.step()
                for i in [i for i, answer in running.items() if answer.done]:
                    answers[i] = _text(running.pop(i))
                    report(len(answers), len(requests))
        return [answers[i] for i in range(len(requests))]

    def _states(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, State]]:
        """A state for every prompt that has read it, in some order."""
        reading = Reading(self._model, prompts, [len(prompt) for prompt in prompts], self._batch)
        for reached in self._counted(reading):
            for i in reached.texts:
                if len(prompts[i]) == reached.read:
                    yield i, reached.state.copy()

    def _counted(self, reading: Reading) -> Iterator[Reached]:
        self.tokens_asked += reading.asked
        before = 0
        for reached in reading:
            self.tokens_read += reading.read - before
            before = reading.read
            yield reached


@dataclass(frozen=True)
class Order:
    """How an answer is to be written."""

    sampling: Sampling
    most: int  # tokens
    until: tuple[str, ...]  # stop strings

    @classmethod
    def of(cls, task: str, given: Mapping[str, Any], seed: int) -> "Order":
        """As a task's generation_kwargs say, in lm-eval's reading of them: greedy unless they ask for drawing.

        Raises `UnsupportedError` for what is not known here.
        """
        asked: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), ANSWER_TOKENS))
        most, until = asked.pop("max_gen_toks"), handle_stop_sequences(asked.pop("until"), eos=None)
        draw = asked.pop("do_sample")
        settings = {name: asked.pop(name, neutral) for name, neutral in _DRAWING.items()}
        if asked.pop("num_beams", 1) != 1 or asked:
            known = ", ".join(("until", "max_gen_toks", "do_sample", *_DRAWING))
            raise UnsupportedError(
                f"task {task}: generation_kwargs: expected {known} and num_beams 1, found {', '.join(sorted(given))}"
            )
        return cls(Sampling(**settings, seed=seed) if draw else Sampling(0.0), most, tuple(filter(None, until)))


def _arguments(request: "Instance") -> tuple[Any, ...]:
    """What is asked: (context, continuation), (text,) or (context, generation_kwargs)."""
    return request.args


def _text(answer: Request) -> str:
    if answer.error is not None:
        raise answer.error
    return answer.text


def _add(
    reached: Reached,
    texts: Sequence[NDArray[np.int64]],
    contexts: Sequence[int],
    sums: NDArray[np.float64],
    greedy: NDArray[np.bool_],
) -> None:
    """Add to the sums of all texts what these logits say of their continuations; row `i` is after token `first + i`."""
    first = reached.read + 1 - len(reached.logits)
    wanted = [i for i in reached.texts if contexts[i] <= reached.read]
    if not wanted:
        return
    rows = reached.logits[max(0, min(contexts[i] for i in wanted) - first) :]
    first = reached.read + 1 - len(rows)
    weights, likeliest = _log_sums(rows), rows.argmax(axis=1)
    if not np.isfinite(weights).all():
        raise GriffinError(f"tokens {first} to {reached.read}: the model's logits hold NaN or infinity")
    for i in wanted:
        after = max(contexts[i], first)
        own = slice(after - first, None)
        targets = texts[i][after : reached.read + 1]
        sums[i] += (rows[own][np.arange(len(targets)), targets] - weights[own]).sum()
        greedy[i] &= bool((likeliest[own] == targets).all())


def _log_sums(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """log(sum(exp)) of every row in float64: where a model is sure, float32 would round what is measured."""
    return np.array([_log_sum(row.astype(np.float64)) for row in logits])


def _log_sum(row: NDArray[np.float64]) -> float:
    top = row.max()
    return float(top + np.log(np.exp(row - top).sum()))
