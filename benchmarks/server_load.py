"""Many clients at once for minutes, against a `griffin serve` of its own: no error, no wrong answer, flat memory.

python benchmarks/server_load.py MODEL.gguf [--clients 64] [--minutes 10] [--json load.json]

MODEL is the demo model, best as F32. Clients talk, write, go away in the middle, read slowly and send nonsense, in both
APIs, streaming and not; more ask than may wait, so that some are told to come again. Every complete answer is compared
with one that the model gave by itself before: it is the same, or differs from a token on that was as good as its rival
(`load_jobs.TIE`), which passes over several texts round in another way. At the end the server gets SIGTERM while
answers run. Exit code 1: an error that is not a client's, a wrong answer, memory that grew, an end out of order.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import httpx
import psutil
from load_clients import TEXT_WAYS, Client, Tally, Unexpected
from load_jobs import TIE, Jobs, Solist, Verdict
from rich.console import Console
from rich.table import Table
from scale import machine

from griffin_gguf.runtime import load

GRACE = 30  # seconds for running answers at the end
MOST_GROWTH = 8 << 20  # bytes of resident memory, over the second half of the time
_URL = re.compile(r"http://[^\s/]+:\d+")
_COUNTER = re.compile(r"^griffin_(prompt|cached|answer)_tokens_total\{[^}]*\} (\S+)$", re.MULTILINE)
_LEAST_MINUTES = 4  # for a word on memory: caches fill first


def main() -> int:
    """Make answers, start the server, let the clients loose, end it, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--waiting", type=int, default=48, help="fewer than clients less slots: then some find no room")
    parser.add_argument("--cache", default="32MiB")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write all figures")
    arguments = parser.parse_args()
    console = Console(width=120)
    console.print(machine())
    with load(arguments.model, threads=arguments.threads) as model:
        jobs = Solist(model).jobs(arguments.slots, arguments.seed)
    ties = sum(margin < TIE for margin in jobs.margins)
    told = (
        f"{len(jobs.all)} prompts answered by the model alone, {ties} of {len(jobs.margins):,} tokens tied with rivals"
    )
    console.print(f"{told}; {arguments.clients} clients, {arguments.minutes:g} minutes", highlight=False)
    options = ["--slots", arguments.slots, "--waiting", arguments.waiting, "--cache", arguments.cache]
    with served(arguments.model, [*options, "--threads", arguments.threads]) as server:
        figures = asyncio.run(measure(server, arguments, jobs))
    show(console, figures)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": machine(), "options": _plain(arguments)} | asdict(figures), indent=1)
        )
    for problem in figures.problems:
        console.print(problem, style="red", markup=False)
    return 1 if figures.problems else 0


@dataclass
class Server:
    """A `griffin serve` that runs."""

    url: str
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list[str])

    @property
    def memory(self) -> tuple[int, int]:
        """Resident bytes of the process, and of those that it has started."""
        one = psutil.Process(self.process.pid)
        others = 0
        for child in one.children(recursive=True):
            try:
                others += child.memory_info().rss
            except psutil.NoSuchProcess:  # it rendered a template and has ended
                continue
        return one.memory_info().rss, others


@dataclass
class Figures:
    """All that was measured; times in seconds, sizes in bytes."""

    tally: Tally
    seconds: float = 0.0
    memory: list[tuple[float, int, int]] = field(default_factory=list[tuple[float, int, int]])
    tokens: dict[str, float] = field(default_factory=dict[str, float])  # prompt, cached, answer
    ending: dict[str, float] = field(default_factory=dict[str, float])
    problems: list[str] = field(default_factory=list[str])

    def minute(self, start: float, stop: float) -> tuple[int, int]:
        """Median resident bytes between two times, of the server and of its children."""
        found = [(one, others) for at, one, others in self.memory if start <= at <= stop]
        return int(median(one for one, _ in found)), int(median(others for _, others in found))

    @property
    def growth(self) -> int:
        """Bytes that the server's memory grew by from the minute in the middle, when caches are full, to the last."""
        middle = self.seconds / 2
        return self.minute(self.seconds - 60, self.seconds)[0] - self.minute(middle - 30, middle + 30)[0]


@contextmanager
def served(model: Path, options: list[object]) -> Iterator[Server]:
    """A server on a free port, killed at the end if it still runs."""
    command = [sys.executable, "-m", "griffin_gguf.cli", "serve", str(model), "--port", "0", *map(str, options)]
    with tempfile.TemporaryDirectory() as data:
        environment = os.environ | {"GRIFFIN_DATA": data}
        command += ["--keep-alive", "-1", "--grace", str(GRACE)]
        with subprocess.Popen(command, text=True, env=environment, stderr=subprocess.PIPE) as process:
            server = Server("", process)
            reader = threading.Thread(target=_read, args=(server,), daemon=True)
            reader.start()
            try:
                while not server.url:
                    if process.poll() is not None:
                        raise SystemExit(f"the server does not run: {''.join(server.lines)}")
                    time.sleep(0.05)
                yield server
            finally:
                process.kill()
                reader.join()


def _read(server: Server) -> None:
    """Keep what the server says, but for the lines of requests that went well."""
    assert server.process.stderr is not None
    for line in server.process.stderr:
        if not server.url and (found := _URL.search(line)):
            server.url = found[0]
        if not re.search(r" (200|4\d\d) \d+ ms", line):
            server.lines.append(line)


async def measure(server: Server, arguments: argparse.Namespace, jobs: Jobs) -> Figures:
    """Let all clients ask for the time given, then end the server."""
    name = arguments.model.stem
    async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as http:
        await http.post("/api/generate", json={"model": name})  # loads it
        figures = Figures(Tally())
        began = figures.tally.began
        until = began + 60 * arguments.minutes
        rng = random.Random(arguments.seed)
        clients = [
            Client(server.url, name, jobs, figures.tally, random.Random(rng.random())) for _ in range(arguments.clients)
        ]
        watching = asyncio.create_task(watch(server, figures))
        await asyncio.gather(*(client.run(until) for client in clients))
        figures.seconds = time.monotonic() - began
        watching.cancel()
        text = (await http.get("/metrics")).text
        figures.tokens = {what: float(value) for what, value in _COUNTER.findall(text)}
        figures.ending = await end(server, http, name, jobs, figures.tally)
    judge(server, figures, arguments.minutes)
    return figures


async def watch(server: Server, figures: Figures) -> None:
    """Note the server's memory every second."""
    while True:
        figures.memory.append((time.monotonic() - figures.tally.began, *server.memory))
        await asyncio.sleep(1)


async def end(server: Server, http: httpx.AsyncClient, name: str, jobs: Jobs, tally: Tally) -> dict[str, float]:
    """SIGTERM once all slots have begun long answers, with as many requests waiting: what became of both."""
    begun = 0
    every, started = asyncio.Event(), time.monotonic()

    async def ask(number: int) -> str:
        nonlocal begun
        job, way = jobs.long[number % len(jobs.long)], TEXT_WAYS[number % 2]
        text, ended = "", False
        try:
            body = way.body(job) | {"model": name, "stream": True}
            async with http.stream("POST", way.path, json=body) as response:
                if response.status_code != 200:
                    return "refused" if response.status_code == 503 else str(response.status_code)
                async for line in response.aiter_lines():
                    line = line.removeprefix("data: ")
                    if '"error"' in line:
                        return "refused"
                    if not text and line:
                        begun += 1
                        if begun == len(jobs.long):
                            every.set()
                    ended = ended or bool(line and way.ended(line))
                    text += "" if line in ("", "[DONE]") else way.text(json.loads(line))
        except (httpx.HTTPError, ValueError, KeyError, Unexpected) as error:
            return type(error).__name__
        if not ended:
            return "cut"
        tally.judge(job, text, jobs.reach, f"{way.name}, while the server ends")
        return "complete"

    running = [asyncio.create_task(ask(number)) for number in range(len(jobs.long))]
    await asyncio.wait_for(every.wait(), 60)
    waiting = [asyncio.create_task(ask(number)) for number in range(len(jobs.long))]
    await asyncio.sleep(0.05)
    server.process.send_signal(signal.SIGTERM)
    signalled = time.monotonic()
    first, second = await asyncio.gather(*running), await asyncio.gather(*waiting)
    code = await asyncio.to_thread(server.process.wait)
    return {
        "running": len(first),
        "running, complete": first.count("complete"),
        "waiting": len(second),
        "waiting, refused": second.count("refused"),
        "waiting, complete": second.count("complete"),  # they had a slot before the signal
        "seconds to begin": signalled - started,
        "seconds to end": time.monotonic() - signalled,
        "exit code": code,
    }


def judge(server: Server, figures: Figures, minutes: float) -> None:
    """Note everything that should not have been."""
    tally, ending = figures.tally, figures.ending
    problems = figures.problems
    problems += tally.errors
    if tally.error_count > len(tally.errors):
        problems.append(f"{tally.error_count} errors in all")
    if ending["running, complete"] != ending["running"]:
        problems.append(
            f"SIGTERM: {ending['running, complete']:g} of {ending['running']:g} running answers were completed"
        )
    if ending["waiting, refused"] + ending["waiting, complete"] != ending["waiting"]:
        problems.append("SIGTERM: some that waited were neither refused nor answered")
    if ending["exit code"] != 0 or ending["seconds to end"] > GRACE:
        problems.append(f"SIGTERM: exit code {ending['exit code']:g} after {ending['seconds to end']:.1f} s")
    if minutes >= _LEAST_MINUTES and figures.growth > MOST_GROWTH:
        problems.append(f"memory grew by {figures.growth / 2**20:.1f} MiB, expected at most {MOST_GROWTH >> 20}")
    if not tally.busy:
        problems.append("nobody found the server without room: more clients, or less --waiting")
    told = [line for line in server.lines if "unexpected" in line or "Traceback" in line]
    problems += [f"the server's log: {line.rstrip()}" for line in told]


def show(console: Console, figures: Figures) -> None:
    """Print the figures."""
    tally, seconds, tokens, ending = figures.tally, figures.seconds, figures.tokens, figures.ending
    table = Table("", "", title=f"{seconds:.0f} s under load", show_header=False, title_justify="left")
    complete = sum(tally.verdicts.values())
    first = [wait for _, wait in tally.first]
    (rss_first, others), (rss_last, _) = figures.minute(0, 60), figures.minute(seconds - 60, seconds)
    rows = {
        "complete answers": f"{complete:,} ({complete / seconds:.1f} a second)",
        **{f"  {how}": f"{count:,}" for how, count in sorted(tally.asked.items())},
        "  the same as alone": f"{tally.verdicts[Verdict.SAME.value]:,}",
        "  other after a tie": f"{tally.verdicts[Verdict.TIE.value]:,}",
        "  wrong": f"{tally.verdicts[Verdict.WRONG.value]:,}",
        "errors that are not a client's": f"{tally.error_count:,}",
        "left in the middle": f"{tally.left:,}",
        "told to come again (429)": f"{tally.busy:,}",
        "nonsense refused": f"{sum(tally.rejected.values()):,} of {len(tally.rejected)} kinds",
        "answer tokens": f"{tokens['answer']:,.0f} ({tokens['answer'] / seconds:.1f} a second)",
        "prompt tokens": f"{tokens['prompt']:,.0f}, of which {tokens['cached'] / tokens['prompt']:.1%} were reused",
        "time to first token": f"p50 {at(first, 0.5):.2f} s, p99 {at(first, 0.99):.2f} s, waiting for a slot included",
        "whole answers": f"p50 {at(tally.whole, 0.5):.2f} s, p99 {at(tally.whole, 0.99):.2f} s",
        "memory": f"{rss_first / 2**20:.1f} MiB in the first minute, {rss_last / 2**20:.1f} in the last; "
        f"{others / 2**20:.1f} of processes that it started",
        "SIGTERM": f"{ending['running, complete']:g} of {ending['running']:g} running answers completed, "
        f"{ending['waiting, refused']:g} of {ending['waiting']:g} that waited refused, "
        f"{ending['waiting, complete']:g} answered; "
        f"ended after {ending['seconds to end']:.1f} s",
    }
    if seconds >= 60 * _LEAST_MINUTES:
        rows["memory, over the second half"] = f"{figures.growth / 2**20:+.1f} MiB"
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def at(values: list[float], part: float) -> float:
    """The quantile of `values`; 0 where there are none."""
    return sorted(values)[min(int(part * len(values)), len(values) - 1)] if values else 0.0


def _plain(arguments: argparse.Namespace) -> dict[str, object]:
    return {name: value.name if isinstance(value, Path) else value for name, value in vars(arguments).items()}


if __name__ == "__main__":
    sys.exit(main())
