"""What a server reads of a conversation: tokens, and time to the first of each answer, with the cache and without.

python benchmarks/prompt_cache.py MODEL.gguf [--tokens 1000] [--turns 4] [--threads 2]

A message of so many tokens, then short ones; the last turn's answer is made again, its message edited, and a new
conversation begun under the same system text. MODEL without a chat template (random weights, say) gets a plain one.
Answers have 16 tokens. Both servers are asked in turn, in one process, through the same code as over HTTP.
"""

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from scale import machine

import griffin_gguf.cli
from griffin_gguf.runtime.chat import ChatTemplate, Message
from griffin_gguf.runtime.sampling import Sampling
from griffin_gguf.runtime.server.answers import Reply, Wish
from griffin_gguf.runtime.server.models import Models, Served
from griffin_gguf.runtime.server.settings import Settings

HELD_OUT = Path(griffin_gguf.cli.__file__).with_name("demo_model") / "heldout.txt"
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
GREEDY = Wish(Sampling(temperature=0), 16)


def main() -> None:
    """Print a row for each request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    asyncio.run(compare(arguments))


async def compare(arguments: argparse.Namespace) -> None:
    """Ask both servers the same, one after the other."""
    table = Table("request", "prompt", "read", "first token", "without: read", "first token", title=machine())
    for column in table.columns[1:]:
        column.justify = "right"
    found = [await talk(arguments, cache) for cache in (2**30, 0)]
    for (name, cached), (_, plain) in zip(*found, strict=True):
        row = [f"{part}" for reply in (cached, plain) for part in told(reply)]
        table.add_row(name, f"{cached.prompt_tokens:,}", *row)
    Console().print(table)


def told(reply: Reply) -> tuple[str, str]:
    """Tokens read, and the seconds until the first of the answer."""
    return f"{reply.prompt_tokens - reply.cached_tokens:,}", f"{reply.prompt_ns / 1e9:.2f} s"


async def talk(arguments: argparse.Namespace, cache: int) -> list[tuple[str, Reply]]:
    """A conversation, and ways back in it, with a cache of so many bytes."""
    models = Models([arguments.model], Settings(threads=arguments.threads, cache_nbytes=cache, slots=1))
    try:
        async with models.use(models.entries()[0].name) as served:
            if served.template is None:
                served.template = ChatTemplate(arguments.model, PLAIN, {})
            return await requests(served, arguments)
    finally:
        await models.close()


async def requests(served: Served, arguments: argparse.Namespace) -> list[tuple[str, Reply]]:
    """Each with what it was called."""
    tokenizer = served.model.tokenizer
    ids = tokenizer.encode(HELD_OUT.read_text(encoding="utf-8")[: 8 * arguments.tokens], bos=False)[: arguments.tokens]
    system = message("system", "You explain texts to people who have not read them. " * 8)
    turns = [system, message("user", tokenizer.decode(ids))]
    done: list[tuple[str, Reply]] = []
    for number in range(1, arguments.turns + 1):
        reply = await ask(served, turns)
        done.append((f"turn {number}", reply))
        asked = list(turns)
        turns += [message("assistant", reply.text), message("user", f"And what of point {number}?")]
    done.append(("the last answer again", await ask(served, asked)))
    done.append(("the last message edited", await ask(served, [*asked[:-1], message("user", "Say it in one line.")])))
    done.append(("another conversation", await ask(served, [system, message("user", "What is a text?")])))
    return done


def message(role: str, content: str) -> Message:
    """One of a conversation."""
    return {"role": role, "content": content}


async def ask(served: Served, messages: Sequence[Message]) -> Reply:
    """The answer, whole."""
    prompt = await asyncio.to_thread(served.chat, messages)
    async with served.answer(prompt, GREEDY) as reply:
        async for _ in reply:
            pass
    return reply


if __name__ == "__main__":
    main()
