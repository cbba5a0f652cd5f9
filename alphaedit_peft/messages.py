"""What an error shows of what was given: a value cut short, and a sentence that can be read.

In: any value, also one that cannot be written out; a place, what is wrong there and what to do.
Out: one line of at most :data:`SHOWN` or :data:`LONGEST` characters.
"""

from __future__ import annotations

SHOWN = 200  # characters of one value
LONGEST = 400  # of a message
PLACE = 120  # of the place in it


def shown(value: object, most: int = SHOWN) -> str:
    """A value as an error shows it: its ``repr``, cut at ``most`` characters."""
    if isinstance(value, (str, bytes)):
        value = value[:most]  # no copy of a file, to show its beginning
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits; too deep
        text = f"<a {type(value).__name__} too large to show>"
    return cut(text, most)


def cut(text: str, most: int) -> str:
    """A text of at most ``most`` characters, with three dots where something is left out."""
    return text if len(text) <= most else text[: most - 3] + "..."


def one_line(text: object) -> str:
    """A text from elsewhere without line breaks, or escapes for the terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def tail(text: str, most: int) -> str:
    """As ``cut``, but the beginning is left out: of a path, its end says more."""
    return text if len(text) <= most else "..." + text[3 - most :]


def sentence(place: object, wrong: str, remedy: str = "") -> str:
    """``place: wrong; remedy``, in at most ``LONGEST`` characters: what is wrong gives way.

    Args:
        place: a file, with line, record or field where known; of a long path the end is kept.
        wrong: what was found there.
        remedy: what to do about it, kept whole.
    """
    where = tail(str(place), PLACE)
    end = f"; {remedy}" if remedy else ""
    return f"{where}: {cut(wrong, LONGEST - len(where) - len(end) - 2)}{end}"
