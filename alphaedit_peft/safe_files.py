"""Files from elsewhere, of which nothing is used before it was checked, and artefacts of two files.

In: a path, and what the file should hold. Out: bytes, JSON values, tensors, or the members of a zip
archive; or a :class:`DamagedFileError`, one sentence that names file, place and remedy, however
strange the file. Sizes and types are taken from headers and checked before anything is read, so
that memory stays near what is valid; nothing is unpickled, no link out of a folder is followed, and
no NaN or infinity gets through.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

import torch
from safetensors.torch import save_file
from torch import Tensor

from alphaedit_peft import parallel, records
from alphaedit_peft.messages import SHOWN, cut, one_line, sentence, shown
from alphaedit_peft.saving import Content, left_aside, read_steadily, replace_folder

MAX_JSON_BYTES = 16 * 2**20
MAX_NAMES_BYTES = 4 * 2**20  # of the list of tensors, or of an archive's members
MAX_TENSOR_BYTES = 64 * 2**30  # moments of 19 layers of d_in 28,672, as in 70B models
MAX_RESULTS_BYTES = 2**30  # of what studies keep
MAX_LINE_BYTES = 16 * 2**20  # of it
FORMAT_VERSION = 1
REMEDY = "make or download it again"
NAME = 100  # characters of a tensor's name in an error
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
_WRONG = (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError)
_WORDS: dict[type, str] = {
    **{str: "text", int: "a whole number", float: "a number", bool: "true or false"},
    **{list: "a list", dict: "an object", type(None): "null"},
}
Types = type | tuple[type, ...]
Damaged = Callable[[str | Path, str], Exception]  # the error for a file: where, what is wrong
Artefact = tuple[dict[str, Tensor], dict[str, Any]]
Fit = Callable[[Mapping[str, tuple[int, ...]], Mapping[str, Any]], object]


class DamagedFileError(ValueError):
    """A file that cannot be used: which, what is wrong, what to do, in one sentence."""


def damaged(where: str | Path, wrong: str) -> DamagedFileError:
    """The error for a file that cannot be used."""
    return DamagedFileError(sentence(where, wrong, REMEDY))


@contextmanager
def refusing(where: str | Path, error: Damaged = damaged) -> Iterator[None]:
    """Say of which file it is what checks of its values raise within; also of nesting too deep."""
    try:
        yield
    except DamagedFileError:
        raise
    except (*_WRONG, RecursionError) as raised:
        told = f"no field {raised}" if isinstance(raised, KeyError) else str(raised)
        raise error(where, told or type(raised).__name__) from raised


@dataclass(frozen=True)
class Field:
    """What a field of a JSON object may be.

    Args:
        types: of the value, exactly: a bool is no int.
        low: least number, or length of a text or list.
        high: the most, likewise.
        each: what the entries of a list, or the values of an object, may be.
        key: a regular expression for the names in an object.
        optional: whether the field may be missing.
    """

    types: Types
    low: float = -math.inf
    high: float = math.inf
    each: Field | None = None
    key: str | None = None
    optional: bool = False

    def wrong(self, value: Any) -> str:
        """What is wrong with a value, and where in it, to be put after its name; "" for nothing."""
        kinds = self.types if isinstance(self.types, tuple) else (self.types,)
        if type(value) not in kinds:
            names = [_WORDS[kind] for kind in kinds if kind is not int or float not in kinds]
            return f"={shown(value)} is not {' or '.join(names)}"
        if isinstance(value, (int, float)):
            within = self.low <= value <= self.high
            return "" if within else f"={shown(value)} is outside {self.low}..{self.high}"
        if value is not None and not self.low <= len(value) <= self.high:
            return f"={shown(value)} is shorter or longer than {self.low}..{self.high}"
        if isinstance(value, dict) and self.key:
            for key in value:
                if not re.fullmatch(self.key, key):
                    return f" holds {shown(key)}, which is no name there"
        if self.each and isinstance(value, (list, dict)):
            for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
                if told := self.each.wrong(entry):
                    return f"[{shown(key)}]{told}"
        return ""


def check_fields(
    values: object, wanted: Mapping[str, Field], what: str = "", *, others: bool = False
) -> dict[str, Any]:
    """The object itself; a ValueError where these are not its fields (``others`` it may have)."""
    if not isinstance(values, dict):
        raise ValueError(f"{what or 'it'}={shown(values)} is not an object")
    missing = sorted(n for n, field in wanted.items() if n not in values and not field.optional)
    unknown = [] if others else sorted(set(values) - set(wanted))
    parts = (f"{shown(missing)} are missing", missing), (f"{shown(unknown)} are unknown", unknown)
    if told := " and ".join(text for text, names in parts if names):
        of = f"of {what} " if what else ""
        raise ValueError(f"fields {of}{told}; it has {', '.join(sorted(wanted))}")
    for name, field in wanted.items():
        if name in values and (told := field.wrong(values[name])):
            raise ValueError(f"{what and what + '.'}{name}{told}")
    return values


@contextmanager
def opened(path: Path, error: Damaged = damaged, within: Path | None = None) -> Iterator[BinaryIO]:
    """A regular file, opened for reading; one that lies ``within`` a folder, where that is given.

    A link out of the folder is followed within the Hub's cache only; pipes and devices never are.
    """
    if not path.is_file():
        there = " (what is there is no regular file)" if path.exists() else ""
        raise error(path, f"the file is missing{there}")
    if within is not None and not any(
        path.resolve().is_relative_to(root) for root in _allowed_roots(within)
    ):
        raise error(path, f"a link leads out of the folder, to {path.resolve()}")
    with path.open("rb") as file:
        yield file


def read_bytes(
    path: Path, limit: int, error: Damaged = damaged, within: Path | None = None
) -> bytes:
    """Read a regular file of at most ``limit`` bytes; see :func:`opened`."""
    with opened(path, error, within) as file:
        size = os.fstat(file.fileno()).st_size
        data = b"" if size > limit else file.read(size + 1)
    if max(size, len(data)) > limit:
        raise error(path, f"the file is larger than the limit of {limit} bytes")
    return data


def parse_json(data: bytes, where: str | Path, error: Damaged = damaged) -> dict[str, Any]:
    """Parse a JSON object, as strictly as a record, of texts that can be saved again."""
    try:
        value = records.parse_json(data.decode("utf-8"))
        if b"\\ud" in data.lower():  # half a surrogate pair is no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except ValueError as raised:
        raise error(where, f"not valid JSON ({cut(one_line(raised), SHOWN)})") from raised
    if not isinstance(value, dict):
        raise error(where, f"holds a JSON {type(value).__name__}, not an object")
    return value


def read_json(
    path: Path, error: Damaged = damaged, limit: int = MAX_JSON_BYTES, within: Path | None = None
) -> dict[str, Any]:
    """Read a file that is a JSON object."""
    return parse_json(read_bytes(path, limit, error, within), path, error)


def json_lines(
    path: Path,
    error: Damaged = damaged,
    limits: tuple[int, int] = (MAX_RESULTS_BYTES, MAX_LINE_BYTES),
    within: Path | None = None,
    *,
    cut: bool = False,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a file, one a line, and where each stands; blank lines are none.

    ``limits``: of bytes in the file, and in a line. ``cut``: leave out a last line without an end.
    """
    with opened(path, error, within) as file:
        if os.fstat(file.fileno()).st_size > limits[0]:
            raise error(path, f"the file is larger than the limit of {limits[0]} bytes")
        number = 0
        while line := file.readline(limits[1] + 1):
            number += 1
            where, ended = f"{path}, line {number}", line.endswith(b"\n")
            if len(line) > limits[1]:
                raise error(where, f"its bytes are more than the limit of {limits[1]}")
            if line.strip() and (ended or not cut):
                yield where, parse_json(line, where, error)


class Stored(NamedTuple):
    """A tensor in a file, as its header has it; bytes ``start`` to ``end`` of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


_ENTRY = {
    "dtype": Field(str),
    "shape": Field(list, high=8, each=Field(int, 0, 2**48)),
    "data_offsets": Field(list, 2, 2, each=Field(int, 0, 2**63)),
}


class TensorFile:
    """A safetensors file whose header alone was read, and found consistent.

    Eight bytes of length, that many of JSON, then the tensors without gaps.

    Args:
        file: open at its beginning.
        path: its name, for errors.
        limit: of its bytes.
    """

    def __init__(self, file: BinaryIO, path: Path, error: Damaged, limit: int) -> None:
        self._file, self._path, self._error = file, path, error
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise error(path, f"the file is larger than the limit of {limit} bytes")
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_NAMES_BYTES:
            raise self._damaged(f"a list of tensors of {length} bytes, more than {MAX_NAMES_BYTES}")
        try:
            header = records.parse_json(file.read(length).decode("utf-8"))
            self.notes, self.tensors = _listed(header, 8 + length, size)
        except _WRONG as raised:
            raise self._damaged(str(raised)) from raised

    def require(self, dtypes: Collection[torch.dtype]) -> None:
        """Refuse tensors of other dtypes."""
        for name, stored in self.tensors.items():
            if stored.dtype not in dtypes:
                what = f"{shown_name(name)} is {stored.dtype}, not one of {dtypes}"
                raise self._error(self._path, what)

    def read(self, name: str) -> Tensor:
        """A tensor of finite numbers, on the CPU."""
        stored = self.tensors[name]
        found = torch.empty(stored.end - stored.start, dtype=torch.uint8)
        self._file.seek(stored.start)
        if len(found) and self._file.readinto(found.numpy()) != len(found):  # type: ignore[attr-defined]
            raise self._damaged(f"{shown_name(name)} is cut off")
        tensor = found.view(stored.dtype).reshape(stored.shape)
        if not finite(tensor):
            raise self._error(self._path, f"{shown_name(name)} holds NaN or infinity")
        return tensor

    def _damaged(self, why: str) -> Exception:
        return self._error(self._path, f"not a safetensors file ({cut(why, SHOWN)})")


@contextmanager
def opened_tensors(
    path: Path, limit: int, error: Damaged = damaged, within: Path | None = None
) -> Iterator[TensorFile]:
    """The header of a safetensors file, whose tensors are then read one by one."""
    with opened(path, error, within) as file:
        yield TensorFile(file, path, error, limit)


def finite(tensor: Tensor) -> bool:
    """Whether every number is finite, found without a copy."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(torch.isfinite(bound)) for bound in tensor.aminmax())


class _InPieces(io.BufferedReader):
    """A file that never gives much at once, as an archive's directory alone would ask for."""

    def read(self, size: int | None = -1) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        if (left if size is None or size < 0 else min(size, left)) > MAX_NAMES_BYTES:
            raise BadZipFile(f"its directory takes more than {MAX_NAMES_BYTES} bytes")
        return super().read(size)


@contextmanager
def opened_archive(
    path: Path, ratio: float, kinds: Collection[int] = (ZIP_STORED, ZIP_DEFLATED)
) -> Iterator[ZipFile]:
    """A zip archive that unpacks to at most ``ratio`` times its size, of these ways of packing.

    Errors are those of ``zipfile``, and a ValueError.
    """
    with _InPieces(io.FileIO(path)) as file, ZipFile(file) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > ratio * path.stat().st_size:
            raise ValueError(f"it unpacks to {unpacked} bytes, over {ratio} times its size")
        if any(m.compress_type not in kinds or m.flag_bits & 1 for m in archive.infolist()):
            raise ValueError("it is packed or encrypted in a way that no such file is")
        yield archive


def write_artefact(
    folder: str | Path, stem: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Write tensors and values, with the format's name and version, into a folder, in one step.

    Of several processes the main one does. The folder's other files stay. A process killed at any
    moment leaves the old two files or the new ones. Errors are those of ``replace_folder``.
    """
    if not parallel.is_main():
        return
    kept = {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"format": stem, "version": FORMAT_VERSION, **values}, indent=2)
    files: dict[str, Content] = {
        f"{stem}.safetensors": partial(save_file, kept),
        f"{stem}.json": (text + "\n").encode(),
    }
    replace_folder(folder, files)


def read_artefact(
    folder: str | Path,
    stem: str,
    fields: Mapping[str, Field],
    fit: Fit = lambda shapes, values: None,
) -> Artefact:
    """Read what ``write_artefact`` wrote, both files of one save.

    ``fit`` is given the tensors' shapes and the values, before any tensor is read, and raises a
    ValueError where they do not go together.

    Raises:
        FileNotFoundError: one of the two files is missing.
        DamagedFileError: a file that is damaged, over its limit, of another format or version, or
            with other fields or types of them, or tensors that do not fit or are not finite
            float32.
    """
    place = left_aside(folder) or Path(folder)
    if not place.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; give the folder of a {stem} artefact")
    return read_steadily(place, lambda found: _read(found, stem, fields, fit))


def versions(*more: str) -> dict[str, str]:
    """Versions of what makes the numbers, as far as it is installed, for provenance."""
    found = {}
    for name in sorted(("alphaedit_peft", "torch", "transformers", *more)):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _read(folder: Path, stem: str, fields: Mapping[str, Field], fit: Fit) -> Artefact:
    json_path, tensor_path = (folder / f"{stem}{end}" for end in (".json", ".safetensors"))
    for path in (json_path, tensor_path):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; {folder} holds no {stem} artefact")
    values = read_json(json_path, within=folder)
    if values.get("format") != stem or values.get("version") != FORMAT_VERSION:
        raise damaged(
            json_path,
            f"format {shown(values.get('format'))} version {shown(values.get('version'))}; this "
            f"version of alphaedit_peft reads {stem!r} version {FORMAT_VERSION}",
        )
    with refusing(json_path):
        check_fields(values, {"format": Field(str), "version": Field(int), **fields})
    with opened_tensors(tensor_path, MAX_TENSOR_BYTES, within=folder) as file:
        file.require((torch.float32,))
        with refusing(tensor_path):
            fit({name: stored.shape for name, stored in file.tensors.items()}, values)
        tensors = {name: file.read(name) for name in file.tensors}
    return tensors, {name: values[name] for name in fields}


def _listed(header: Any, start: int, size: int) -> tuple[dict[str, str], dict[str, Stored]]:
    """Notes and tensors of a header; they have to fill the file from ``start`` to its end."""
    if not isinstance(header, dict):
        raise ValueError("its list of tensors is no JSON object")
    notes = header.pop("__metadata__", {})
    if told := Field(dict, each=Field(str)).wrong(notes):
        raise ValueError(f"__metadata__{told}")
    found: dict[str, Stored] = {}
    for name, entry in header.items():
        check_fields(entry, _ENTRY, shown_name(name))
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{shown_name(name)} is of dtype {shown(entry['dtype'])}")
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        first, end = entry["data_offsets"]
        if end - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{shown_name(name)} {shape} does not fill bytes {first}..{end}")
        found[name] = Stored(dtype, shape, start + first, start + end)
    place = start
    for stored in sorted(found.values(), key=lambda stored: (stored.start, stored.end)):
        if stored.start != place:
            raise ValueError(f"nothing, or two tensors, are at byte {place}")
        place = stored.end
    if place != size:
        raise ValueError(f"it has {size} bytes, and its tensors end at {place}")
    return notes, found


def shown_name(name: str) -> str:
    """A tensor's or module's name as it is, unless it is long or does not print."""
    return name if name.isprintable() and len(name) <= NAME else shown(name, NAME)


def _allowed_roots(folder: Path) -> list[Path]:
    """The folder itself and, inside the Hub's cache, the blobs that its snapshots link to.

    The cache keeps a repository in models--OWNER--NAME, with snapshots/COMMIT and blobs.
    """
    here = folder.resolve()
    repositories = [
        parent.parent
        for parent in here.parents
        if parent.name == "snapshots" and parent.parent.name.startswith("models--")
    ]
    return [here, *(repository / "blobs" for repository in repositories)]
