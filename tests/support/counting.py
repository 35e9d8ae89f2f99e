"""A model that notes what it is fed."""

from collections.abc import Sequence
from typing import Any


class Counting:
    """Everything of a model; `fed` are the tokens that went through `forward`."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.fed: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, tokens: Sequence[int], state: Any) -> Any:
        self.fed += tokens
        return self._model.forward(tokens, state)

    def since(self) -> list[int]:
        """What was fed since the last call."""
        fed, self.fed = self.fed, []
        return fed
