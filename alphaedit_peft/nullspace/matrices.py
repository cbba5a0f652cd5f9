"""Matrices in the files of other programs: plain tensors out, or a sentence on what is wrong.

In: a safetensors file and a name, or a torch file of projectors. Out: finite tensors. Nothing is
unpickled but tensors; ``check_moment`` tells what can be a mean of k k^T.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from alphaedit_peft.nullspace.npz import MAX_WIDTH, ForeignFileError

TOLERANCE = 1e-3  # of a moment's symmetry and of |C_ij| <= sqrt(C_ii C_jj), relative to its largest


def read_matrix(path: Path, name: str) -> Tensor:
    """A matrix of a safetensors file, in float32.

    Raises:
        FileNotFoundError: no such file.
        ForeignFileError: a damaged file.
        ValueError: a name that the file does not have.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a safetensors file of matrices")
    try:
        with safe_open(path, "pt") as file:
            held = sorted(file.keys())
            found = file.get_tensor(name) if name in held else None
    except Exception as error:
        raise ForeignFileError(f"{path} is no readable safetensors file: {error}") from error
    if found is None:
        raise ValueError(f"{path} holds no matrix {name!r}; it holds {held[:20]}")
    return found.float()


def read_projectors(path: Path) -> Tensor:
    """The one tensor (layers, d_in, d_in) of a torch file, mapped from the disk.

    Raises:
        FileNotFoundError: no such file.
        ForeignFileError: a file that is damaged or holds anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a file such as null_space_project.pt")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ForeignFileError(
            f"{path} is damaged, or holds more than tensors ({type(error).__name__}); nothing of "
            "it was run: ask for a file that torch.save made of one tensor"
        ) from error
    if not isinstance(found, Tensor) or found.ndim != 3 or found.shape[1] != found.shape[2]:
        what = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else type(found)
        raise ForeignFileError(
            f"{path} holds {what}, but projectors are one tensor (layers, d_in, d_in)"
        )
    plain = found.layout is torch.strided and found.is_floating_point() and found.is_contiguous()
    if not plain or found.is_meta or not 0 < found.shape[1] <= MAX_WIDTH:
        raise ForeignFileError(
            f"{path} holds no plain matrices of 1 to {MAX_WIDTH} floats a side: "
            f"{tuple(found.shape)}, {found.dtype}, {found.layout}"
        )
    if not bool(torch.isfinite(found).all()):
        raise ForeignFileError(f"{path} holds NaN or infinity; compute the projectors again")
    return found.detach()


def check_moment(moment: Tensor, where: str) -> None:
    """Refuse what cannot be a mean of k k^T.

    Raises:
        ForeignFileError: not square, not finite, not symmetric, or with
            |C_ij| > sqrt(C_ii C_jj), which no second moment has.
    """
    shape = tuple(moment.shape)
    if moment.ndim != 2 or shape[0] != shape[1] or not 0 < shape[0] <= MAX_WIDTH:
        raise ForeignFileError(f"{where} is {shape}, but a second moment is (d_in, d_in)")
    if not bool(torch.isfinite(moment).all()):
        raise ForeignFileError(f"{where} holds NaN or infinity; collect it again, in float32")
    allowed = TOLERANCE * float(moment.abs().max())
    error = float((moment - moment.T).abs().max())
    if error > allowed:
        raise ForeignFileError(f"{where} is off symmetric by {error:.2g}; it is no second moment")
    root = moment.diagonal().clamp_min(0).sqrt()  # (d_in,)
    excess = float((moment.abs() - torch.outer(root, root)).max())
    if excess > allowed:
        raise ForeignFileError(
            f"{where} has an entry {excess:.2g} above sqrt(C_ii C_jj), which no mean of k k^T has; "
            "is it a correlation, or the moment of something else?"
        )
