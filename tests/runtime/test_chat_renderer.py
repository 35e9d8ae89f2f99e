"""The process that renders templates: hostile ones, limits, threads, forks, mishaps."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from threading import Thread
from time import monotonic, sleep
from uuid import uuid4

import psutil
import pytest
from chats import chat_template, user

from griffin_gguf.runtime import chat_worker
from griffin_gguf.runtime.chat_renderer import Renderer
from griffin_gguf.runtime.errors import FileFormatError

WORKER = Path(chat_worker.__file__)
ECHO = "{{ text }}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def renderer() -> Iterator[Renderer]:
    with closing(Renderer()) as renderer:
        yield renderer


def rendered(renderer: Renderer, text: str, template: str = ECHO) -> dict[str, str]:
    return renderer.ask({"template": template, "variables": {"text": text}})


def worker_of(renderer: Renderer) -> psutil.Process:
    """Its process, which this starts if need be."""
    before = set(psutil.Process().children())
    assert rendered(renderer, "a") == {"text": "a"}
    (found,) = set(psutil.Process().children()) - before
    return found


def becomes_true(condition: Callable[[], bool]) -> bool:
    """Whether it does, in the end."""
    deadline = monotonic() + 60
    while not condition() and monotonic() < deadline:
        sleep(0.01)
    return condition()


# Which limit is met first depends on the machine.
LIMIT = "within a second of processor time|too much memory|does not end"

HOSTILE = {
    "endless loop": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        LIMIT,
    ),
    "exponential macro": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        LIMIT,
    ),
    "doubling list": (
        "{% set n = namespace(x=[]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
        LIMIT,
    ),
    "slow text": ("{{ lipsum(10000000) }}", LIMIT),
    "endless recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "deep nesting": ("{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}", "RecursionError|MemoryError|ended with status"),
    "100 MB of output": ("{% for i in range(9999) %}{{ 'x' * 10000 }}{% endfor %}", "the text does not end"),
    "string times number": ("{{ 'x' * 10 ** 10 }}", LIMIT),
    "width of a format": ("{{ '%1000000000d' % 1 }}", LIMIT),
    "width of str.format": ("{{ '{:>1000000000}'.format(1) }}", LIMIT),
    "width of a filter": ("{{ 'a' | center(10 ** 10) }}", LIMIT),
    "doubling string": (
        "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        LIMIT,
    ),
    "huge power": ("{{ 9 ** (9 ** 9) }}", LIMIT),
    "huge range": ("{{ range(10 ** 9) | list }}", "Range too big"),
    "globals": ("{{ lipsum.__globals__['os'].popen('id').read() }}", "SecurityError"),
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "globals by filter": ("{{ (lipsum | attr('__globals__'))['os'] }}", "SecurityError"),
    "globals by format": ("{{ '{0.__globals__[os]}'.format(lipsum) }}", "SecurityError"),
    "changing the messages": ("{{ messages.append(1) }}", "SecurityError"),
    "other files": ("{% include '/etc/hostname' %}", "no loader"),
    "syntax": ("{% if %}", "TemplateSyntaxError"),
    "undefined": ("{{ nothing.at.all }}", "UndefinedError: 'nothing' is undefined"),
}


@pytest.mark.parametrize(("template", "problem"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_template_ends_in_one_line_that_names_it(template: str, problem: str) -> None:
    with pytest.raises(FileFormatError, match=problem) as caught:
        chat_template(template).render([user("a")])
    line = str(caught.value)
    assert line.startswith("model.gguf: tokenizer.chat_template: ")
    assert line.isprintable()
    assert len(line) < 500


@pytest.mark.parametrize(
    "template", [ENDLESS, "{{ raise_exception('no') }}", "{{ 'x' * 10 ** 10 }}", "{{ nothing.x }}"]
)
def test_after_a_template_at_fault_the_next_rendering_works(renderer: Renderer, template: str) -> None:
    worker = worker_of(renderer)
    assert "text" not in rendered(renderer, "a", template)
    assert rendered(renderer, "b") == {"text": "b"}
    assert worker.is_running()


def test_one_rendering_leaves_nothing_for_the_next(renderer: Renderer) -> None:
    sets = "{% set text = 'mine' %}{% macro upper(x) %}{% endmacro %}{% set secret = 'mine' %}{{ cycler('a').next() }}"
    asks = "{{ text }} {{ secret is defined }} {{ 'a' | upper }} {{ upper is defined }}"
    assert rendered(renderer, "a", sets) == {"text": "a"}
    assert rendered(renderer, "yours", asks) == {"text": "yours False A False"}


def test_many_threads_at_once_get_each_its_own(renderer: Renderer) -> None:
    texts = [f"{i} " * (1 + 5000 * (i % 7)) for i in range(200)]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda text: rendered(renderer, text), texts))
    assert answers == [{"text": text} for text in texts]


def test_a_slow_template_holds_up_no_other(renderer: Renderer) -> None:
    slow = dict[str, str]()
    thread = Thread(target=lambda: slow.update(rendered(renderer, "", ENDLESS)))
    thread.start()
    while thread.is_alive():
        assert rendered(renderer, "a") == {"text": "a"}
    assert "within a second of processor time" in slow["problem"]


# What a child of the worker finds; the worker itself is the real one.
def with_answer(tmp_path: Path, answer: str, setting: str = "") -> Path:
    """The worker with another function in the place of the one that renders."""
    program = tmp_path / "worker.py"
    program.write_text(
        f"import json, os, resource, signal, sys, time\n"
        f"sys.path.append({str(WORKER.parent)!r})\n"
        f"import chat_worker\n"
        f"def answer(template, variables, limit):\n"
        f"    return {answer}\n"
        f"chat_worker.answer = answer\n"
        f"{setting}\n"
        f"chat_worker.main()\n"
    )
    return program


def test_every_child_has_its_limits(tmp_path: Path) -> None:
    limits = (
        "{'text': json.dumps([resource.getrlimit(resource.RLIMIT_CORE), resource.getrlimit(resource.RLIMIT_AS)[0], "
        "signal.getitimer(signal.ITIMER_PROF)[0], signal.getitimer(signal.ITIMER_REAL)[0], limit])}"
    )
    with closing(Renderer(with_answer(tmp_path, limits))) as renderer:
        for text in ("", "a" * 1_000_000):
            core, memory, processor, wall, output = json.loads(rendered(renderer, text)["text"])
            assert core == [0, 0]
            size = len(json.dumps({"template": ECHO, "variables": {"text": text}}))
            assert memory == (chat_worker.MEMORY + 32 * size if sys.platform == "linux" else memory)
            assert 0 < processor < 1.1 * chat_worker.CPU_SECONDS
            assert 0 < wall < 1.1 * chat_worker.WALL_SECONDS
            assert output == chat_worker.OUTPUT + size


def test_limits_hold_where_the_program_blocks_signals(tmp_path: Path) -> None:
    """Which processes inherit."""
    blocked = {signal.SIGPROF, signal.SIGALRM, signal.SIGCHLD}
    with closing(Renderer()) as renderer:
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        try:
            assert "within a second" in rendered(renderer, "", ENDLESS)["problem"]
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("time.sleep(600)", "the template did not end within "),
        ("os.abort()", f"rendering ended with status {-signal.SIGABRT}"),
        ("os._exit(3)", "rendering ended with status 3"),
        ("os.write(0, b'half an answ') and 1 / 0", "rendering ended with status 1"),
    ],
)
def test_a_child_that_gives_no_answer(tmp_path: Path, answer: str, problem: str) -> None:
    with closing(Renderer(with_answer(tmp_path, answer, "chat_worker.WALL_SECONDS = 0.3"))) as renderer:
        for _ in range(2):
            assert rendered(renderer, "a")["problem"].startswith(problem)


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("import time; time.sleep(600)", "the renderer did not start within 0.5 s"),
        ("raise SystemExit('no more')", "the renderer ended with status 1: no more"),
        ("import os; os.write(0, b'x'); os._exit(1)", "the renderer was ended"),
        ("import os, time; os.write(0, b'x'); time.sleep(600)", "the renderer did not answer within 0.5 s"),
    ],
)
def test_a_worker_that_gives_no_answer(tmp_path: Path, program: str, problem: str) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(program)
    before = psutil.Process().children()
    with closing(Renderer(worker, patience=0.5)) as renderer:
        assert rendered(renderer, "a") == {"problem": problem}
    assert psutil.Process().children() == before


# Mishaps.


def test_a_worker_that_was_ended_from_outside_is_replaced(renderer: Renderer) -> None:
    for _ in range(3):
        worker = worker_of(renderer)
        worker.kill()
        assert rendered(renderer, "b") == {"text": "b"}
        assert not worker.is_running()
        renderer.close()


def test_a_worker_ended_in_the_middle_of_a_rendering(renderer: Renderer) -> None:
    worker, answer = worker_of(renderer), dict[str, str]()
    thread = Thread(target=lambda: answer.update(rendered(renderer, "", ENDLESS)))
    thread.start()
    assert becomes_true(lambda: bool(worker.children()))
    worker.kill()
    thread.join()
    assert "within a second of processor time" in answer["problem"]  # the next worker's word


def test_a_worker_that_stands_still_is_replaced(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = worker_of(renderer)
    worker.suspend()
    with monkeypatch.context() as patch:
        patch.setattr(renderer, "_patience", 0.3)
        assert rendered(renderer, "a") == {"problem": "the renderer did not answer within 0.3 s"}
    assert rendered(renderer, "b") == {"text": "b"}
    assert not worker.is_running()


def test_no_descriptor_and_no_process_stays(renderer: Renderer) -> None:
    worker, this = worker_of(renderer), psutil.Process()
    assert becomes_true(lambda: not worker.children())
    mine, its, children = this.num_fds(), worker.num_fds(), this.children()
    for _ in range(10):
        for template in (ECHO, "{{ nothing.x }}", "{{ 'x' * 10 ** 10 }}", "{{ raise_exception('no') }}"):
            rendered(renderer, "a", template)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda text: rendered(renderer, text), "a" * 100))
    assert becomes_true(lambda: not worker.children())
    assert (this.num_fds(), worker.num_fds(), this.children()) == (mine, its, children)
    renderer.close()
    assert this.num_fds() == mine - 1
    assert not worker.is_running()


def test_ctrl_c_does_not_reach_it(renderer: Renderer) -> None:
    assert os.getsid(worker_of(renderer).pid) != os.getsid(0)


# Programs of their own, and all the processes that come from them.

PROGRAM = """
import os, signal, threading
from griffin_gguf.runtime.chat_renderer import ask

def render(text, template="{{ text }}"):
    answer = ask({"template": template, "variables": {"text": text}})
    return answer.get("text")

assert render("a") == "a"
"""

ENDS = {
    "it returns": "",
    "it raises": "raise SystemExit(1)",
    "it exits at once": "os._exit(0)",
    "it is killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "it is killed in the middle of a rendering": f"""
threading.Thread(target=render, args=("", {ENDLESS!r}), daemon=True).start()
os.kill(os.getpid(), signal.SIGKILL)
""",
    "it ends in the middle of a rendering": f"""
threading.Thread(target=render, args=("", {ENDLESS!r}), daemon=True).start()
""",
}

FORKS = """
import psutil

def renders(text):
    rendered = all(render(f"{text} {i}") == f"{text} {i}" for i in range(20))
    return rendered and any("chat_worker.py" in " ".join(p.cmdline()) for p in psutil.Process().children())

busy = threading.Thread(target=lambda: [renders("thread") for _ in range(5)])
busy.start()
children = []
for i in range(3):
    child = os.fork()
    if not child:
        try:
            same = renders(f"child {i}")
            grandchild = os.fork()
            if not grandchild:
                os._exit(0 if renders("grandchild") else 1)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]) if same else 1)
        finally:
            os._exit(2)
    children.append(child)
    assert renders("parent")
assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
busy.join()
print("done")
"""


def run(program: str) -> tuple[str, str]:
    """What a program prints and what it complains of; by then none of its processes is left."""
    mark = uuid4().hex
    environment = {**os.environ, "PROGRAM_OF_A_TEST": mark}
    command = [sys.executable, "-X", "dev", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert becomes_true(lambda: not any(mark in environment_of(process) for process in psutil.process_iter()))
    return done.stdout, done.stderr


def environment_of(process: psutil.Process) -> str:
    with suppress(psutil.Error, OSError):
        return process.environ().get("PROGRAM_OF_A_TEST", "")
    return ""


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
def test_it_ends_with_the_program(end: str) -> None:
    assert run(PROGRAM + end) == ("", "")


def test_a_forked_program_renders_by_a_worker_of_its_own() -> None:
    assert run(PROGRAM + FORKS) == ("done\n", "")
