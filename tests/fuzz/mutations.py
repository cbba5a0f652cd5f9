"""Changes of a file's bytes that a hostile or careless writer may have made.

In: a file's name and valid bytes, and a source of random choices. Out: other bytes: flips, cuts and
insertions in any file; values, keys and nesting in JSON; names, dtypes, shapes, offsets and numbers
of tensors in safetensors, ``.npz`` and ``.pt``; encodings of text.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import warnings
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

RAW = {  # put as they are in the place of a string that stands for them
    "@digits@": "9" * 5000,
    "@lists@": "[" * 50_000 + "]" * 50_000,
    "@objects@": '{"a":' * 3000 + "1" + "}" * 3000,
    "@nan@": "NaN",
    "@inf@": "-Infinity",
    "@overflow@": "1e999",
}
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 2**31, 2**53 + 1, 2**63, 10**400, 0.5, -0.0, 1.5, 1e308),
    *("", " ", "x", "{}", "x" * 3000, "\ud800", "\0\x1b[2J", "../../etc/passwd", "own", "float32"),
    *([], {}, [1], ["a"], [[[]]], {"a": {"b": [None]}}, *RAW),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool)
FILLS = (0.0, 1.0, -1.0, 1e30, 1e38, float("nan"), float("inf"), float("-inf"))
SHAPES = ([], [0], [1], [3, 0], [1, 1], [2, 3], [3, 3], [3, 12], [12, 6], [1, 4, 4], [60])
NUMBERS = (-1, 0, 1, 3, 7, 2**20, 2**31, 2**40, 2**62, 2**63, 2**64 - 1, 1.5, None, "4")
Change = Callable[[bytes, Random], bytes]


def mutated(name: str, data: bytes, draw: Random) -> bytes:
    """A file's bytes after one to three changes that suit its name."""
    own = _BY_SUFFIX.get(name[name.rfind(".") :], ())
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        change = draw.choice(own) if own and draw.random() < 0.8 else draw.choice(_ANY)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                data = change(data, draw)
        except Exception:  # an earlier change left no such file to change in this way
            data = draw.choice(_ANY)(data, draw)
    return data


def _flipped(data: bytes, draw: Random) -> bytes:
    found = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        if found:
            found[draw.randrange(len(found))] = draw.randrange(256)
    return bytes(found)


def _cut(data: bytes, draw: Random) -> bytes:
    start = draw.randrange(len(data) + 1)
    return data[:start] if draw.random() < 0.6 else data[start:]


def _inserted(data: bytes, draw: Random) -> bytes:
    place = draw.randrange(len(data) + 1)
    more = draw.choice((draw.randbytes(draw.randint(1, 40)), b"\0" * 9, b"\n\n", data[:200], b"]}"))
    return data[:place] + more + data[place:]


def _without_a_part(data: bytes, draw: Random) -> bytes:
    start = draw.randrange(len(data) + 1)
    return data[:start] + data[start + draw.randint(1, 40) :]


def _replaced(data: bytes, draw: Random) -> bytes:
    empty_zip = b"PK\x05\x06" + b"\0" * 18
    return draw.choice((b"", b"\xff\xfe", b"{}", b"[]", b"null", empty_zip, b"\x80"))


def _json(data: bytes, draw: Random) -> bytes:
    return _dumped(_value(json.loads(data), draw), draw)


def _json_line(data: bytes, draw: Random) -> bytes:
    lines = data.split(b"\n")
    place = draw.randrange(len(lines))
    kind = draw.randrange(6)
    if kind == 0:
        del lines[place]
    elif kind == 1:
        lines.insert(place, draw.choice(lines))
    elif kind == 2:
        lines.insert(place, draw.choice((b"[]", b"{}", b"null", b"\xff", b"{", b" ", b"1")))
    else:
        lines[place] = _json(lines[place], draw)
    return b"\n".join(lines)


def _value(value: Any, draw: Random) -> Any:
    """A JSON value with one place in it changed."""
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.1:
        return draw.choice(VALUES)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw.choice(keys)
    kind = draw.randrange(8)
    if kind == 0:
        if isinstance(value, dict):
            return {k: v for k, v in value.items() if k != key}
        return value[:key] + value[key + 1 :]
    if kind == 1:
        more = draw.choice(VALUES)
        name = str(draw.choice(("", "x", "0", "-1", "01", "9" * 30, "\ud800", "a" * 500, "é")))
        return {**value, name: more} if isinstance(value, dict) else [*value, more]
    if kind == 2 and isinstance(value, dict):
        other = draw.choice((f"{key}x", key.upper(), "", "1", draw.choice(keys)))
        return {other if k == key else k: v for k, v in value.items()}
    if kind == 3:
        inner = draw.choice(VALUES)
    elif kind == 4:
        inner = draw.choice(([value[key]], {"a": value[key]}, str(value[key])))
    else:
        inner = _value(value[key], draw)
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = inner
    return copy


def _dumped(value: Any, draw: Random) -> bytes:
    text = json.dumps(value, ensure_ascii=draw.random() < 0.7)
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text.encode("utf-8", "surrogatepass")


def _recoded(data: bytes, draw: Random) -> bytes:
    text = data.decode("utf-8")
    kind = draw.randrange(5)
    if kind == 0:
        return gzip.compress(data)
    return text.encode(("utf-16", "utf-8-sig", "latin-1", "utf-32")[kind - 1], "replace")


def _rows(data: bytes, draw: Random) -> bytes:
    """Lines of a table or text: mixed, cut at other places, quoted or parted in another way."""
    text = data.decode("utf-8")
    old = draw.choice((",", "\n", '"', " ", "subject", "{}", "|", "Subject"))
    new = draw.choice(
        (";", "\t", "\r\n", "\r", '"', '""', "", "\0", "\u2028", ",,,", "x" * 200_000)
    )
    return text.replace(old, new, draw.choice((1, 1, -1))).encode()


def _header(data: bytes, draw: Random) -> bytes:
    """Another list of tensors before the same numbers."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = draw.choice([*header])
    kind = draw.randrange(8)
    if kind < 3:
        header = _value(header, draw)
    elif kind == 3:
        header[name]["shape"] = [draw.choice(NUMBERS) for _ in range(draw.randint(0, 4))]
    elif kind == 4:
        header[name]["data_offsets"] = [draw.choice(NUMBERS) for _ in range(draw.randint(0, 3))]
    elif kind == 5:
        header[name]["dtype"] = draw.choice(
            ("F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "X", "")
        )
    elif kind == 6:
        header["__metadata__"] = draw.choice(VALUES)
    text = _dumped(header, draw)
    if kind == 7:  # a name twice
        text = text[:-1] + b"," + _dumped({name: header[name]}, draw)[1:]
    wrong = draw.random() < 0.2
    size = draw.choice([n for n in NUMBERS if type(n) is int and n >= 0]) if wrong else len(text)
    return struct.pack("<Q", size) + text + data[8 + length :]


def _tensors(data: bytes, draw: Random) -> bytes:
    """A well-formed file of other tensors."""
    held = load(data)
    name = draw.choice([*held])
    kind = draw.randrange(7)
    if kind == 0:
        del held[name]
    elif kind == 1:
        held[draw.choice((f"{name}.x", name.upper(), "", "z", "é" * 200))] = held.pop(name)
    elif kind == 2:
        held["more"] = torch.zeros(draw.choice(SHAPES))
    elif kind == 3:
        held[name] = held[name].to(draw.choice(DTYPES))
    elif kind == 4:
        held[name] = torch.full(draw.choice(SHAPES), draw.choice(FILLS)).to(draw.choice(DTYPES))
    elif kind == 5:
        held[name] = held[name].flip(0) if held[name].ndim else held[name]
        held[name] = held[name].T if draw.random() < 0.5 else held[name] * draw.choice(FILLS)
    else:
        flat = held[name].flatten()
        if len(flat) and flat.is_floating_point():
            flat[draw.randrange(len(flat))] = draw.choice(FILLS)
        held[name] = flat.reshape(held[name].shape)
    return save({key: tensor.contiguous() for key, tensor in held.items()})


def _arrays(data: bytes, draw: Random) -> bytes:
    """Another ``.npz`` file: arrays, names and ways of packing."""
    with np.load(io.BytesIO(data)) as file:
        held: dict[str, Any] = {name: file[name] for name in file.files}
    name = draw.choice([*held])
    kind = draw.randrange(7)
    if kind == 0:
        del held[name]
    elif kind == 1:
        held[draw.choice((f"{name}x", "mom2", "count", "x" * 300))] = held.pop(name)
    elif kind == 2:
        held[name] = np.full([abs(n) for n in draw.choice(SHAPES)], draw.choice(FILLS))
    elif kind == 3:
        held[name] = np.array(draw.choice((-1, 0, 2**62, 1e300, np.nan, "text", None, [1, 2], 1j)))
    elif kind == 4:
        types = ("<f2", ">f4", "<f8", ">f8", "<i4", "<f16", "S4", "<c8", "?", "<u8")
        held[name] = held[name].astype(draw.choice(types))
    elif kind == 5 and held[name].ndim:
        held[name] = held[name] * draw.choice(FILLS) if draw.random() < 0.5 else held[name][:-1]
    buffer = io.BytesIO()
    (np.savez_compressed if draw.random() < 0.3 else np.savez)(buffer, **held)
    return buffer.getvalue()


def _members(data: bytes, draw: Random) -> bytes:
    """The members of an archive: cut, renamed, twice, packed otherwise, or a bomb."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        held = [(m.filename, archive.read(m)) for m in archive.infolist()]
    i = draw.randrange(len(held))
    name, content = held[i]
    kind = draw.randrange(6)
    if kind == 0:
        held[i] = (name, _flipped(content, draw))
    elif kind == 1:
        held[i] = (name, _cut(content, draw))
    elif kind == 2:
        held[i] = (draw.choice((f"{name}x", f"../{name}", "", "data.pkl", "x.npy")), content)
    elif kind == 3:
        held[i] = (name, content[:80] + bytes(draw.choice((10, 10**5, 10**6))))
    elif kind == 4:
        held.append((draw.choice((name, "more.npy")), content))
    else:  # another header of an array
        digits = str(draw.choice((0, 1, 7, 99999, 10**9, 10**30))).encode()
        held[i] = (name, content.replace(b"(6, 6)", b"(" + digits + b", " + digits + b")"))
    buffer = io.BytesIO()
    ways = (zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)
    with zipfile.ZipFile(buffer, "w", draw.choice(ways)) as archive:
        for name, content in held:
            archive.writestr(zipfile.ZipInfo(name or "x"), content, draw.choice(ways))
    return buffer.getvalue()


def _torch_file(data: bytes, draw: Random) -> bytes:
    """Something else that ``torch.save`` wrote."""
    P = torch.eye(6).repeat(2, 1, 1)
    some: tuple[Any, ...] = (
        *(P[0], [P], {"P": P}, P.to(draw.choice(DTYPES)), P * draw.choice(FILLS), None, "text", 1),
        *(torch.full(draw.choice(SHAPES), draw.choice(FILLS)), P.to_sparse(), P.to("meta")),
        *(
            torch.ones(1).expand(2, 10**6, 10**6),
            P.transpose(1, 2),
            P[:, :, :3],
            P.requires_grad_(),
        ),
        *(torch.nn.Linear(2, 2), np.eye(3), Random(0)),
    )
    buffer = io.BytesIO()
    legacy = draw.random() < 0.2
    torch.save(draw.choice(some), buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


_ANY: tuple[Change, ...] = (_flipped, _cut, _inserted, _without_a_part, _replaced)
_BY_SUFFIX: dict[str, tuple[Change, ...]] = {
    ".json": (_json, _json, _json, _json, _recoded),
    ".jsonl": (_json_line, _json_line, _json_line, _json_line, _recoded),
    ".csv": (_recoded, _rows, _rows),
    ".txt": (_recoded, _rows),
    ".safetensors": (_header, _tensors),
    ".npz": (_arrays, _members),
    ".pt": (_torch_file, _members),
}
