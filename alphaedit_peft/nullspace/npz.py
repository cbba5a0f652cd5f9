"""One ``.npz`` file of ROME or MEMIT: a sum of k k^T and a count in, the mean k k^T out.

In: a file that numpy's ``savez`` made of their ``SecondMoment``: ``mom2.mom2`` (d_in, d_in), the
sum over all tokens; ``mom2.count``, how many tokens; ``sample_size``, how many texts (a NaN stands
for none). A moment saved by itself has the names without ``mom2.``. Out: :class:`NpzMoment`.
Headers and sizes are checked before memory is taken, and nothing is unpickled.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

MAX_WIDTH = 65_536  # of a matrix that is read; 17 GB in float32
MAX_RATIO = 16  # a file may unpack to this times its size; moments hardly compress


class ForeignFileError(ValueError):
    """A file of another program that cannot be read: it is damaged, hostile or something else."""


@dataclass(frozen=True)
class NpzMoment:
    """What one file holds: C0 (d_in, d_in) in float32, tokens, and texts where the file says."""

    moment: Tensor
    count: int
    texts: int | None


def read_npz_moment(path: Path) -> NpzMoment:
    """Read one file.

    Raises:
        FileNotFoundError: no such file.
        ForeignFileError: a file that is damaged or hostile, or holds no second moment.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a .npz file of second moments")
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(path, archive)
    except ForeignFileError:
        raise
    except Exception as error:  # zipfile and numpy raise many kinds for damaged files
        raise ForeignFileError(f"{path} is no readable .npz file: {error}") from error


def _read(path: Path, archive: zipfile.ZipFile) -> NpzMoment:
    unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > MAX_RATIO * path.stat().st_size:
        raise ForeignFileError(
            f"{path} unpacks to {unpacked} bytes, over {MAX_RATIO} times its size, as no second "
            "moments do"
        )
    held = {name.removesuffix(".npy") for name in archive.namelist()}
    prefix = "mom2." if "mom2.mom2" in held else ""
    if not {f"{prefix}mom2", f"{prefix}count"} <= held:
        raise ForeignFileError(
            f"{path} holds {sorted(held)[:20]}, but second moments are 'mom2.mom2' and 'mom2.count'"
        )
    count = _whole(_array(path, archive, f"{prefix}count", dimensions=0))
    if count is None or count < 1:
        raise ForeignFileError(f"{path}: {prefix}count is no number of tokens; it is damaged")
    texts = None
    if "sample_size" in held:
        texts = _whole(_array(path, archive, "sample_size", dimensions=0))
    total = torch.from_numpy(_array(path, archive, f"{prefix}mom2", dimensions=2))
    total = total if total.dtype == torch.float64 else total.float()
    return NpzMoment((total / count).float(), count, texts)


def _array(path: Path, archive: zipfile.ZipFile, name: str, dimensions: int) -> Any:
    """An array, in this machine's byte order, after a look at its header."""
    with archive.open(f"{name}.npy") as file:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ForeignFileError(f"{path}: {name} is of .npy version {version}, not 1 or 2")
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(file)
    if dtype.kind not in ("iuf" if dimensions == 0 else "f") or dtype.itemsize > 8:
        raise ForeignFileError(
            f"{path}: {name} is of type {dtype}, not numbers of at most 64 bits; objects are never "
            "unpickled"
        )
    square = len(set(shape)) <= 1 and all(0 < size <= MAX_WIDTH for size in shape)
    if len(shape) != dimensions or not square:
        raise ForeignFileError(
            f"{path}: {name} is of shape {shape}; it is "
            f"{f'square, at most {MAX_WIDTH} a side' if dimensions else 'one number'}"
        )
    size = dtype.itemsize
    for side in shape:
        size *= side
    if size > archive.getinfo(f"{name}.npy").file_size:
        raise ForeignFileError(f"{path}: {name} is cut off; fetch the file again")
    with archive.open(f"{name}.npy") as file:
        found = npy.read_array(file, allow_pickle=False)
    return np.array(found, dtype=found.dtype.newbyteorder("="))


def _whole(number: Any) -> int | None:
    """A 0-dimensional array as an int; None for what is no whole number, such as NaN."""
    value = float(number)
    return int(number) if value.is_integer() else None
