"""Numbers and names as people read them, in tables and plots."""

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def clean(text: str) -> str:
    """`text` on one line, with every control character spelled out: names in files are other people's."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def size_text(count: float) -> str:
    """Bytes in binary units, three digits as a rule: 512 MiB, 1.75 GiB."""
    power = min(max(int(count).bit_length() - 1, 0) // 10, len(UNITS) - 1)
    value = count / 1024**power
    return f"{value:.0f} {UNITS[power]}" if value >= 100 else f"{value:.3g} {UNITS[power]}"


def digits(value: float) -> str:
    """Three digits, all of them where there are more before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def clipped(name: str, length: int = 40) -> str:
    """A name in at most so many characters, cut in the middle: its end tells as much as its beginning."""
    if len(name) <= length:
        return name
    tail = length // 2
    return f"{name[: length - tail - 1]}…{name[-tail:]}"
