"""Compiles one JSON schema; a program of its own, which `griffin_gguf.runtime.grammar` starts by this file's path.

A schema came with somebody's request, and llguidance bounds what it compiles only in part: an integer that must be
a multiple of 62615533, or some hundred patterns for names of properties, keep it busy for minutes, and no other
thread can end that. A process has limits that hold.

What compiles can still be too much to follow: an object of thousands of properties that may all come next. So random
texts are begun, as a model would say them.

Reads one JSON object from stdin: `schema` (text), and the `options` and `limits` for llguidance. Writes one to
stdout: `problem`, empty for a schema that compiled, that some text satisfies, and of which these texts could be
followed. Ends by a signal where the time is over. Imports nothing but llguidance and the standard library.
"""

import json
import random
import resource
import signal
import sys
import time
from typing import Any

import llguidance

CPU_SECONDS = 1.0
WALKING_SECONDS = 0.25  # of them; what is not come to then is left to llguidance's own limits
WALKS, STEPS = 4, 200  # texts, bytes of each
FORM = frozenset(b'"{}[],:')
MEMORY = 1 << 30  # bytes of address space


class Bytes:
    """A vocabulary of the 256 bytes and an end: compiling takes the same for all, and this one is made at once."""

    eos_token_id = 256
    bos_token_id = None
    special_token_ids = (256,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")

    def __call__(self, text: bytes) -> list[int]:
        """The tokens of `text`."""
        return list(text)


def problem(schema: str, options: Any, limits: dict[str, Any]) -> str:
    """What keeps llguidance from following `schema`; empty where nothing does."""
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))
    try:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=options)
    except ValueError as error:
        return str(error)
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=llguidance.LLParserLimits(**limits))
    if matcher.is_error():
        return matcher.get_error()
    matcher.compute_bitmask()  # shows whether a text can begin at all
    return "no text satisfies it" if matcher.is_error() else obstacle(matcher)


def obstacle(matcher: llguidance.LLMatcher) -> str:
    """What keeps llguidance from going on within one of some texts; empty where nothing does."""
    draw, end = random.Random(0), time.process_time() + WALKING_SECONDS
    for _ in range(WALKS):
        walk = matcher.deep_copy()
        for _ in range(STEPS):
            allowed = bytes_of(walk.compute_bitmask())
            if not allowed or walk.is_error() or time.process_time() > end:
                break
            # Half of the time what begins, parts or ends something, so that a text gets anywhere.
            form = [byte for byte in allowed if byte in FORM]
            walk.consume_token(draw.choice(form if form and draw.random() < 0.5 else allowed))
        if walk.is_error():
            return walk.get_error()
    return ""


def bytes_of(mask: bytes) -> list[int]:
    """The bytes of which `mask` has a bit: those that may come next."""
    return [byte for byte in range(256) if mask[byte >> 3] >> (byte & 7) & 1]


def main() -> None:
    """One request, one answer."""
    request = json.loads(sys.stdin.buffer.read())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # macOS knows no such limit; there the time bounds the memory
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF ends the process, inside compiled code too
    found = problem(request["schema"], request["options"], request["limits"])
    signal.setitimer(signal.ITIMER_PROF, 0)
    sys.stdout.buffer.write(json.dumps({"problem": found}).encode())


if __name__ == "__main__":
    main()
