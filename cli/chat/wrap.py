"""Words of an answer on the lines of a terminal, as they come."""

from rich.cells import cell_len


class Wrap:
    """Breaks lines between words, at `width` columns; a word is given out once it is complete.

    Words longer than a line are left to the terminal, and so is a line's indentation.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._column = 0
        self._space = self._word = ""

    def push(self, text: str) -> str:
        """Add `text`; what is certain of it now."""
        return "".join(self._add(character) for character in text)

    def flush(self) -> str:
        """The last word."""
        return self._end_word()

    def _add(self, character: str) -> str:
        if character == "\n":
            out = self._end_word() + self._space + "\n"
            self._space, self._column = "", 0
            return out
        if character in " \t":
            out = self._end_word()
            self._space += character
            return out
        self._word += character
        return ""

    def _end_word(self) -> str:
        """The word with the space before it, or on a new line in its place."""
        if not self._word:
            return ""
        space, word, self._space, self._word = self._space, self._word, "", ""
        size = cell_len(word)
        breaks = self._column and self._column + len(space) + size > self._width
        end = size if breaks else self._column + len(space) + size
        self._column = end if end <= self._width else end % self._width
        return f"\n{word}" if breaks else space + word
