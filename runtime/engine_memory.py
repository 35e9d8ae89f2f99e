"""What an engine takes at most, reckoned before anything is taken."""

from dataclasses import dataclass

import psutil

from griffin_gguf.runtime.model import Model


@dataclass(frozen=True)
class Memory:
    """What an engine takes at most beside the weights, in bytes; `str` of it is a sentence."""

    slots: int
    states: int
    logits: int
    buffers: int  # of the largest step
    free: int  # when it was reckoned

    @property
    def total(self) -> int:
        """All of it."""
        return self.states + self.logits + self.buffers

    def __str__(self) -> str:
        answers = "1 answer" if self.slots == 1 else f"{self.slots} answers"
        parts = f"states {_mib(self.states)}, logits {_mib(self.logits)}, buffers {_mib(self.buffers)}"
        return f"{answers} at once: at most {_mib(self.total)} beside the weights ({parts}); {_mib(self.free)} are free"

    @classmethod
    def of(cls, model: Model, slots: int) -> "Memory":
        """A bound for `model` with so many slots: states have a fixed size, and a step at most `Model.chunk` tokens."""
        # Of each text a state keeps the last logits; the step's own lie there twice, as computed and as read.
        logits = 3 * slots * 4 * model.hp.vocab
        free = psutil.virtual_memory().available
        return cls(slots, slots * model.state_nbytes, logits, model.buffers_nbytes(slots), free)


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
