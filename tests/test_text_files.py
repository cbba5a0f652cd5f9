"""Text files: every encoding that says what it is, and a sentence for whatever is no text."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import re
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaedit_peft import text_files
from alphaedit_peft.text_files import DataError, read_lines, read_text

TEXT = "naïve 漢字 😀\r\ntwo\u2028three\n\nfour"


def zipped(name: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(name, "x")
    return data.getvalue()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_that_say_what_they_are(tmp_path, encoding):
    path = tmp_path / "file"
    path.write_bytes(TEXT.encode(encoding))
    assert read_text(path) == TEXT
    lines = ["naïve 漢字 😀\r\n", "two\u2028three\n", "\n", "four"]
    assert list(read_lines(path)) == list(enumerate(lines, start=1))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff")),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    times=st.sampled_from([1, 500]),
)
def test_any_text_is_read_as_it_was_written(tmp_path_factory, text, encoding, times):
    path = tmp_path_factory.mktemp("text") / "file"
    path.write_bytes((f"# {text}" * times).encode(encoding))
    assert read_text(path) == f"# {text}" * times
    assert "".join(line for _, line in read_lines(path)) == f"# {text}" * times


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(b"x", mtime=0), "it is gzip; gunzip it first"),
        (zipped("a.json"), "it is a zip archive; unzip it first"),
        (zipped("[Content_Types].xml"), r"an Office document \(.xlsx or .docx\); save the sheet"),
        (b"PAR1\x15\x04", r"it is Parquet; .*to_json\(NEW, orient='records', lines=True\)"),
        (b"%PDF-1.7", "it is PDF; copy its text"),
        (pickle.dumps([1]), "it is a pickle; it is not opened; save it as JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer; .* git lfs pull"),
        (b"one\ncaf\xe9 au lait", "file, line 2: byte 0xe9 after 'caf' is not UTF-8; .*iconv"),
        (b"one\xff", "file, line 1: byte 0xff after 'one' is not UTF-8"),
        ("é\n".encode("utf-16-le") * 9, "is not UTF-8|a NUL character"),
        ("a\nb".encode("utf-16-le"), "line 1: a NUL character; .* UTF-16 without its byte order"),
        (b"\xff\xfea", "byte 0x61 after '' is not UTF-16-LE"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_named(tmp_path, data, message):
    path = tmp_path / "file"
    path.write_bytes(data)
    for read in (read_text, lambda path: list(read_lines(path))):
        with pytest.raises(DataError, match=message) as caught:
            read(path)
        assert len(str(caught.value)) <= 400


def test_places_that_are_no_file(tmp_path):
    for read in (read_text, lambda path: list(read_lines(path))):
        with pytest.raises(DataError, match="it is a folder; give the name of a file in it"):
            read(tmp_path)
        with pytest.raises(DataError, match="/dev/null: it is a device, not a file"):
            read("/dev/null")
        with pytest.raises(FileNotFoundError, match="nowhere: there is no such file; check its"):
            read(tmp_path / "nowhere")


def test_a_pipe_is_read(tmp_path):
    for encoding in ("utf-8", "utf-16"):
        ends = os.pipe()
        os.write(ends[1], TEXT.encode(encoding))
        os.close(ends[1])
        assert "".join(line for _, line in read_lines(f"/dev/fd/{ends[0]}")) == TEXT
        os.close(ends[0])


def test_sizes_are_looked_at_before_anything_is_read(tmp_path):
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(text_files.MAX_BYTES + 1)  # sparse: it takes no room on the disk
    with pytest.raises(DataError, match=re.escape("larger than 1,073,741,824 bytes; split it")):
        read_text(path)


def test_a_line_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_LINE", 10_000)
    path = tmp_path / "file"
    path.write_text("a" * 9_000 + "\n" + "b" * 10_001)
    lines = read_lines(path)
    assert next(lines) == (1, "a" * 9_000 + "\n")
    with pytest.raises(DataError, match="line 2: the line is longer than 10,000 bytes; break"):
        next(lines)
