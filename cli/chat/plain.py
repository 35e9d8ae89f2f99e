"""Text that a terminal shows and does not obey."""

import re

#: Control characters that move the cursor, change colours or name the window: all but newline and tab.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def plain(text: str) -> str:
    """`text` with every control character but newline and tab spelled out: what was stored may be another's."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text.replace("\r\n", "\n"))


def checked(name: str, text: str) -> str:
    """`text` as it is. Raises `FileFormatError` naming it where bytes came that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        from griffin_gguf.runtime.errors import FileFormatError

        raise FileFormatError(name, "text", f"is not UTF-8: invalid byte behind {error.start} characters") from None
    return text
