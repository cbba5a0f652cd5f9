"""Text that users give, whatever program wrote it, read strictly and without guessing.

In: a file. Out: its text, or its lines, decoded from UTF-8, or from UTF-16 and UTF-32 where a byte
order mark says so. Anything else is named: what it seems to be, on which line, and what to do.
"""

from __future__ import annotations

import codecs
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from alphaedit_peft.messages import sentence, shown

MAX_BYTES = 2**30  # of a file that is read at once
MAX_LINE = 2**24  # bytes of a line
_MARKS = (  # UTF-32 before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CSV = "save the sheet as CSV in UTF-8"
_PARQUET = "pandas.read_parquet(FILE).to_json(NEW, orient='records', lines=True) makes JSON lines"
_KINDS = (
    (b"\x1f\x8b", "gzip", "gunzip it first"),
    (b"BZh91AY", "bzip2", "bunzip2 it first"),
    (b"\xfd7zXZ", "xz", "unxz it first"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd it first"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it first"),
    (b"PK\x03\x04", "a zip archive", "unzip it first"),
    (b"PAR1", "Parquet", _PARQUET),
    (b"ARROW1", "Arrow", "load it with datasets, and save it with to_json"),
    (b"%PDF", "PDF", "copy its text into a text file"),
    (b"\xd0\xcf\x11\xe0", "an old Office document", _CSV),
    (b"\x93NUMPY", "a numpy array", "give texts, not numbers"),
    (b"SQLite format 3", "an SQLite database", "export the table as CSV"),
    *((b"\x80" + bytes([n]), "a pickle", "it is not opened; save it as JSON") for n in range(2, 6)),
    (b"version https://git-lfs", "a Git LFS pointer", "fetch the file itself: git lfs pull"),
)


class DataError(ValueError):
    """A file or record that cannot be used: where, what is wrong, what to do."""


def fault(place: object, wrong: str, remedy: str = "") -> DataError:
    """The error about a file, or a place in it, as one ``sentence``."""
    return DataError(sentence(place, wrong, remedy))


def is_text(value: str) -> bool:
    """Whether a text can be written to a file: it holds no half of a surrogate pair."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_text(path: str | Path) -> str:
    """The whole text of a file of at most ``MAX_BYTES``.

    Raises:
        DataError: a folder, a device, a file that is too large, or one that is no text.
        FileNotFoundError: no such file.
        OSError: a file that may not be read.
    """
    with _open(path) as file:
        return _whole(file, path, *_begun(file, path))


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a file, each with its number and its line end; one is in memory at a time.

    Only a file in UTF-16 or UTF-32 is read at once. Raises as ``read_text``, and DataError for a
    line over ``MAX_LINE``.
    """
    with _open(path) as file:
        begun, encoding = _begun(file, path)
        if encoding == "utf-8":
            yield from _utf8_lines(begun, file, path)
        else:
            text = _whole(file, path, begun, encoding)
            yield from enumerate(io.StringIO(text, newline="\n"), start=1)


def _whole(file: BinaryIO, path: str | Path, begun: bytes, encoding: str) -> str:
    size = max(os.fstat(file.fileno()).st_size, len(begun))
    data = begun if size > MAX_BYTES else begun + file.read()
    if max(size, len(data)) > MAX_BYTES:
        raise fault(path, f"the file is larger than {MAX_BYTES:,} bytes", "split it")
    return _decoded(data, encoding, path, 1)


def _utf8_lines(data: bytes, file: BinaryIO, path: str | Path) -> Iterator[tuple[int, str]]:
    number = 1
    while data := data or file.readline(MAX_LINE + 1):
        line, end, data = data.partition(b"\n")
        if not end:  # it goes on after what was read to find out what the file is
            line += file.readline(MAX_LINE + 1)
        if len(line) > MAX_LINE:
            raise fault(
                f"{path}, line {number}",
                f"the line is longer than {MAX_LINE:,} bytes",
                "break it into lines",
            )
        yield number, _decoded(line + end, "utf-8", path, number)
        number += 1


@contextmanager
def _open(path: str | Path) -> Iterator[BinaryIO]:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise FileNotFoundError(sentence(path, "there is no such file", "check its name")) from None
    if stat.S_ISDIR(mode):
        raise fault(path, "it is a folder", "give the name of a file in it")
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        raise fault(path, "it is a device, not a file", "give the name of a file")
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:  # of reading, which does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error


def _begun(file: BinaryIO, path: str | Path) -> tuple[bytes, str]:
    """The beginning of a file without its byte order mark, and the encoding that it shows."""
    data = file.read(4096)
    for magic, kind, remedy in _KINDS:
        if data.startswith(magic):
            if b"[Content_Types].xml" in data:
                kind, remedy = "an Office document (.xlsx or .docx)", _CSV
            raise fault(path, f"it is {kind}", remedy)
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return data[len(mark) :], encoding
    return data, "utf-8"


def _decoded(data: bytes, encoding: str, path: str | Path, line: int) -> str:
    """Bytes from this line on as text, without NUL characters."""
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        before = data[: error.start].decode(encoding, "replace")
        found = data[error.start]
        raise fault(
            f"{path}, line {line + before.count(chr(10))}",
            f"byte 0x{found:02x} after {shown(before[-20:].rpartition(chr(10))[2])} is not "
            f"{encoding.upper()}",
            "save the file as UTF-8; from Latin-1: iconv -f latin1 -t utf-8 FILE > NEW",
        ) from None
    if "\0" in text:
        raise fault(
            f"{path}, line {line + text.count(chr(10), 0, text.index(chr(0)))}",
            "a NUL character; the file is binary, or UTF-16 without its byte order mark",
            "save it as text in UTF-8",
        )
    return text
