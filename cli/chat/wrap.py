"""Words of an answer on the lines of a terminal, as they come."""

from rich.cells import cell_len


class Wrap:
    """Breaks lines between words, at `width` columns; a word is given out once it is complete.

    Wide characters, Chinese ones and such, are words by themselves: they stand without spaces, and a line may end
    behind each. Of a word that is longer than a line nothing is held back any more; where it breaks is left to the
    terminal, and so is a line's indentation.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._column = 0
        self._space = self._word = ""
        self._long = False  # within a word that is longer than a line

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
        size = cell_len(character)
        if size == 0 and not self._word and not self._space:
            return character  # an accent or such, of the character that has just been given out
        if size > 1:
            out = self._end_word()
            self._word = character
            return out + self._end_word()
        if self._long:
            self._column = self._column + 1 if self._column < self._width else 1
            return character
        self._word += character
        if cell_len(self._word) <= self._width:
            return ""
        out = self._end_word()
        self._long = True
        return out

    def _end_word(self) -> str:
        """The word with the space before it, or on a new line in its place."""
        self._long = False
        if not self._word:
            return ""
        space, word, self._space, self._word = self._space, self._word, "", ""
        size = cell_len(word)
        breaks = self._column and self._column + len(space) + size > self._width
        end = size if breaks else self._column + len(space) + size
        self._column = end if end <= self._width else end % self._width
        return f"\n{word}" if breaks else space + word
