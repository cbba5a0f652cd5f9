"""Statistics that other programs wrote, read into this package's own artefacts.

In: second moments of ROME and MEMIT (``.npz``, one file a layer), covariances in a safetensors
file, or the projectors of AlphaEdit's reference code (``null_space_project.pt``). Out: a
:class:`~alphaedit_peft.nullspace.space.KeyMoments`, or a
:class:`~alphaedit_peft.nullspace.space.NullSpace` where only projectors are known. Nothing is
unpickled, sizes are checked before memory is taken, and no number is used before it was checked. A
missing file is a FileNotFoundError, what cannot be used of one a :class:`ForeignFileError`, and
layers or widths that the given model does not have are a ValueError.
"""

from __future__ import annotations

import math
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED

import torch
from numpy.lib import format as npy
from torch import Tensor

from alphaedit_peft.architecture import describe
from alphaedit_peft.fingerprint import BaseFingerprint, bare_model, fingerprint
from alphaedit_peft.messages import one_line, sentence, shown
from alphaedit_peft.nullspace.space import KeyMoments, NullSpace
from alphaedit_peft.nullspace.spectrum import MAX_WIDTH, PROJECTOR, LayerSpace
from alphaedit_peft.safe_files import (
    REMEDY,
    DamagedFileError,
    finite,
    opened_archive,
    opened_tensors,
    refusing,
    shown_name,
    versions,
)
from alphaedit_peft.settings import EditOptions

MAX_RATIO = 16  # a file may unpack to this times its size; moments hardly compress
MAX_BYTES = 64 * 2**30  # of a file of matrices
MAX_PICKLE_BYTES = 2**20  # of what torch.save writes of one tensor besides its numbers
ROWS_AT_ONCE = 256
TOLERANCE = 1e-3  # of a moment's symmetry and of |C_ij| <= sqrt(C_ii C_jj), relative to its largest
_NPZ_NAME = re.compile(r"(?P<module>.+)_float(16|32|64)_[a-z0-9_-]*mom2[a-z0-9_{}-]*\.npz")


class ForeignFileError(DamagedFileError):
    """A file of another program that cannot be read: it is damaged, hostile or something else."""


def _foreign(where: str | Path, wrong: str, remedy: str = REMEDY) -> ForeignFileError:
    return ForeignFileError(sentence(where, wrong, remedy))


def read_second_moments(
    files: Mapping[int, str | Path] | Iterable[str | Path],
    *,
    model: Any = None,
    config: EditOptions | None = None,
) -> KeyMoments:
    """Key moments from the ``.npz`` files of ROME and MEMIT: C0 = sum / count.

    Args:
        files: one a layer, named as those programs do, such as
            ``transformer.h.13.mlp.c_proj_float32_mom2_100000.npz``, which tells the layer; or
            layer -> file, whatever its name. A layer twice is a ValueError.
        model: the base that they are of: its widths are checked, and the result is bound to it by
            a fingerprint. Without it, they are taken for any model of these widths.
        config: names the parts of a model whose family is not known.
    """
    given = files if isinstance(files, Mapping) else _by_layer(files)
    named = {int(layer): Path(path) for layer, path in given.items()}
    if not named:
        raise ValueError("files is empty; give one .npz file for each rewrite layer")
    moments, tokens, texts = {}, {}, {}
    for layer, path in sorted(named.items()):
        moments[layer], tokens[layer], texts[layer] = _npz_moment(path)
    names = {layer: _module_and_layer(named[layer])[0] for layer in moments}
    source = "second moments of ROME or MEMIT (.npz)"
    modules, made_for, origin = _origin(source, model, config, moments, names)
    folders = {path.resolve().parent.name for path in named.values()}
    corpora = sorted(name.removesuffix("_stats") for name in folders if name.endswith("_stats"))
    provenance = {
        "corpus": ", ".join(corpora) or "an unknown corpus",
        "texts": next(iter(texts.values())),
        "tokens_by_layer": {str(layer): count for layer, count in tokens.items()},
        "files": {str(layer): path.name for layer, path in named.items()},
        **origin,
    }
    return KeyMoments(moments, min(tokens.values()), modules, made_for, provenance)


def read_covariances(
    path: str | Path,
    names: Mapping[int, str],
    tokens: int,
    *,
    summed: bool = False,
    model: Any = None,
    config: EditOptions | None = None,
) -> KeyMoments:
    """Key moments from a safetensors file that holds one matrix (d_in, d_in) a layer.

    The matrices are means of k k^T, not centred ones: C0 is not a covariance in the strict sense.
    ``model`` and ``config`` are as for ``read_second_moments``.

    Args:
        names: layer -> name of its matrix; one that the file does not have is a ValueError.
        tokens: how many tokens went into each.
        summed: whether they are sums over the tokens rather than means.
    """
    path = Path(path)
    if not names or tokens < 1:
        raise ValueError(
            f"names={dict(names)} and tokens={tokens} must say which matrix is of which layer, and "
            "over how many tokens they were collected"
        )
    divisor = tokens if summed else 1
    moments = {
        int(layer): _checked(_matrix(path, name).div_(divisor), path, shown_name(name))
        for layer, name in sorted(names.items())
    }
    modules, made_for, origin = _origin("covariances (.safetensors)", model, config, moments)
    provenance = {
        "corpus": f"an unknown corpus ({path.name})",
        "files": {str(layer): f"{path.name}: {names[layer]}" for layer in moments},
        **origin,
    }
    return KeyMoments(moments, tokens, modules, made_for, provenance)


def read_projector(
    path: str | Path,
    layers: Sequence[int],
    *,
    model: Any = None,
    config: EditOptions | None = None,
) -> NullSpace:
    """The null space in a ``null_space_project.pt`` of AlphaEdit's reference code.

    The file holds P alone, (layers, d_in, d_in). Eigenvalues and tokens are not known: the
    spectrum is 1 where P removes and 0 where it keeps, ``tokens`` is 0, and the threshold cannot be
    moved from 0.5 (absolute). ``model`` and ``config`` are as for ``read_second_moments``.

    Args:
        layers: which blocks the projectors are of, in the file's order, which the file does not
            tell: the ``layers`` of the hyper-parameters it was made with. Another number of them
            than the file holds is a ValueError.
    """
    path = Path(path)
    stacked = _projectors(path)
    if len(set(layers)) != len(layers) or len(layers) != len(stacked):
        raise ValueError(
            f"layers={list(layers)} must be {len(stacked)} distinct blocks, as {path} holds "
            f"{len(stacked)} projectors; give the layers of the settings that it was made with"
        )
    of_layer = {int(layer): stacked[i] for i, layer in enumerate(layers)}
    source = "projectors of AlphaEdit's reference code (.pt)"
    _, made_for, origin = _origin(source, model, config, of_layer)
    parts = {}
    for layer in sorted(of_layer):
        try:
            parts[layer] = LayerSpace.from_projector(of_layer[layer])
        except ValueError as error:
            raise _foreign(
                path,
                f"the matrix given for layer {layer} cannot be used: {error}",
                "a key moment is read with read_second_moments or read_covariances",
            ) from error
    provenance = {
        "corpus": f"an unknown corpus ({path.name})",
        "spectrum": "not known: 1 where the projector removes, 0 where it keeps",
        "files": {str(layer): f"{path.name}[{i}]" for i, layer in enumerate(layers)},
        **origin,
    }
    with refusing(path, _foreign):
        return NullSpace(parts, *PROJECTOR, 0, made_for, provenance)


def _by_layer(files: Iterable[str | Path]) -> dict[int, str | Path]:
    found: dict[int, str | Path] = {}
    for path in [files] if isinstance(files, str | Path) else files:
        layer = _module_and_layer(Path(path))[1]
        if layer is None:
            raise ValueError(
                f"{path} does not tell its layer, as "
                "'transformer.h.13.mlp.c_proj_float32_mom2_100000.npz' does; give {layer: file}"
            )
        if layer in found:
            raise ValueError(f"{path} and {found[layer]} are both of layer {layer}; give one")
        found[layer] = path
    return found


def _module_and_layer(path: Path) -> tuple[str, int | None]:
    """Name of the module in a file's name, and the one number in it; "" and None without."""
    match = _NPZ_NAME.fullmatch(path.name)
    numbers = [part for part in match["module"].split(".") if part.isdecimal()] if match else []
    if match is None or len(numbers) != 1:
        return "", None
    return match["module"], int(numbers[0])


@contextmanager
def _parsing(path: Path, kind: str, of: str) -> Iterator[None]:
    """Refuse a file that is not there, and one on which its parser raises, whatever it raises."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a {kind} of {of}")
    try:
        yield
    except ForeignFileError:
        raise
    except Exception as error:  # each parser has errors of its own
        why = one_line(error) or type(error).__name__
        raise _foreign(path, f"it is no readable {kind} ({why})") from error


def _npz_moment(path: Path) -> tuple[Tensor, int, int | None]:
    """What a file holds: C0 (d_in, d_in) in float32, tokens, and texts where it says."""
    with _parsing(path, ".npz file", "second moments"), opened_archive(path, MAX_RATIO) as archive:
        total, count, texts = _arrays(path, archive)
    return _checked(total.div_(count).float(), path), count, texts


def _arrays(path: Path, archive: zipfile.ZipFile) -> tuple[Tensor, int, int | None]:
    """The sum of k k^T, in float32 or float64, and how many tokens and texts it is over."""
    held = {name.removesuffix(".npy") for name in archive.namelist()}
    prefix = "mom2." if "mom2.mom2" in held else ""
    if not {f"{prefix}mom2", f"{prefix}count"} <= held:
        wrong = f"it holds {shown(sorted(held))}, not 'mom2.mom2' and 'mom2.count'"
        raise _foreign(path, wrong)
    count = _whole(_array(path, archive, f"{prefix}count", dimensions=0))
    if count is None or not 0 < count < 2**62:
        raise _foreign(path, f"{prefix}count is no number of tokens")
    said = "sample_size" in held
    texts = _whole(_array(path, archive, "sample_size", dimensions=0)) if said else None
    total = torch.from_numpy(_array(path, archive, f"{prefix}mom2", dimensions=2))
    return total if total.dtype == torch.float64 else total.float(), count, texts


def _array(path: Path, archive: zipfile.ZipFile, name: str, dimensions: int) -> Any:
    """An array, in this machine's byte order, after a look at its header."""
    with archive.open(f"{name}.npy") as file:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise _foreign(path, f"{name} is of .npy version {version}, not 1 or 2")
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(file)
    if dtype.kind not in ("iuf" if dimensions == 0 else "f") or dtype.itemsize > 8:
        wrong = f"{name} is of type {dtype}, not numbers of at most 64 bits"
        raise _foreign(path, wrong, "objects are never unpickled")
    square = len(set(shape)) <= 1 and all(0 < size <= MAX_WIDTH for size in shape)
    if len(shape) != dimensions or not square:
        wanted = f"square, at most {MAX_WIDTH} a side" if dimensions else "one number"
        raise _foreign(path, f"{name} is of shape {shown(shape)}; it is {wanted}")
    if dtype.itemsize * math.prod(shape) > archive.getinfo(f"{name}.npy").file_size:
        raise _foreign(path, f"{name} is cut off", "fetch the file again")
    with archive.open(f"{name}.npy") as file:
        found = npy.read_array(file, allow_pickle=False)
    return found.astype(found.dtype.newbyteorder("="), copy=False)


def _whole(number: Any) -> int | None:
    """A 0-dimensional array as an int; None for what is no whole number, such as NaN."""
    value = float(number)
    return int(number) if value.is_integer() else None


def _matrix(path: Path, name: str) -> Tensor:
    """A matrix of a safetensors file, in float32."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a safetensors file of matrices")
    with opened_tensors(path, MAX_BYTES, _foreign) as file:
        if name not in file.tensors:
            wrong = f"no matrix {shown(name)}; it holds {shown(sorted(file.tensors))}"
            raise ValueError(sentence(path, wrong, "name one of these"))
        shape = file.tensors[name].shape
        if len(shape) != 2 or shape[0] != shape[1] or not 0 < shape[0] <= MAX_WIDTH:
            raise _foreign(
                path, f"{shown_name(name)} is {shape}, but a second moment is (d_in, d_in)"
            )
        return file.read(name).float()


def _projectors(path: Path) -> Tensor:
    """The one tensor (layers, d_in, d_in) of a torch file, mapped from the disk."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a file such as null_space_project.pt")
    try:
        with opened_archive(path, 1, (ZIP_STORED,)) as archive:
            sizes = {m.filename.rpartition("/")[2]: m.file_size for m in archive.infolist()}
        if sizes.get("data.pkl", 0) > MAX_PICKLE_BYTES:
            raise ValueError(f"its data.pkl takes more than {MAX_PICKLE_BYTES} bytes")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice to who wrote the file
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        wrong = f"it is damaged, or holds more than tensors ({type(error).__name__})"
        remedy = "nothing of it was run: ask for a file that torch.save made of one tensor"
        raise _foreign(path, wrong, remedy) from error
    if not isinstance(found, Tensor) or found.ndim != 3 or found.shape[1] != found.shape[2]:
        what = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else type(found)
        raise _foreign(path, f"it holds {what}, but projectors are one tensor (layers, d_in, d_in)")
    plain = found.layout is torch.strided and found.is_floating_point() and found.is_contiguous()
    if not plain or found.is_meta or not 0 < found.shape[1] <= MAX_WIDTH:
        what = f"{tuple(found.shape)}, {found.dtype}, {found.layout}"
        raise _foreign(path, f"it has no plain matrices of 1 to {MAX_WIDTH} floats a side: {what}")
    if not finite(found):
        raise _foreign(path, "it holds NaN or infinity", "compute the projectors again")
    return found.detach()


def _checked(moment: Tensor, path: Path, name: str = "it") -> Tensor:
    """A moment, unless it can be no mean of k k^T, which has |C_ij| <= sqrt(C_ii C_jj)."""
    if not finite(moment):
        raise _foreign(path, f"{name} holds NaN or infinity", "collect it again, in float32")
    allowed = TOLERANCE * max(abs(float(bound)) for bound in moment.aminmax())
    root = moment.diagonal().clamp_min(0).sqrt()  # (d_in,)
    error = excess = 0.0
    for start in range(0, len(moment), ROWS_AT_ONCE):  # a copy of the whole may not fit
        some = slice(start, start + ROWS_AT_ONCE)
        error = max(error, float((moment[some] - moment[:, some].T).abs().max()))
        bound = torch.outer(root[some], root)
        excess = max(excess, float((moment[some].abs() - bound).max()))
    if error > allowed:
        raise _foreign(path, f"{name} is off symmetric by {error:.2g}, so it is no second moment")
    if excess > allowed:
        raise _foreign(
            path,
            f"{name} has an entry {excess:.2g} above sqrt(C_ii C_jj), which no mean of k k^T has",
            "is it a correlation, or the moment of something else?",
        )
    return moment


def _origin(
    source: str,
    model: Any,
    config: EditOptions | None,
    matrices: Mapping[int, Tensor],
    named: Mapping[int, str] | None = None,
) -> tuple[dict[int, str], BaseFingerprint | None, dict[str, Any]]:
    """Check layers, widths and module names against a model, where there is one.

    Returns:
        Layer -> module, the model's fingerprint, and provenance: what ``source`` is, and versions.
    """
    named, about = named or {}, {"format": source, "model": None, "versions": versions()}
    if model is None:
        return {layer: named.get(layer, "") for layer in matrices}, None, about
    base = bare_model(model)
    parts = (config.block_module, config.rewrite_module) if config else (None, None)
    architecture = describe(base, *parts)
    architecture.check_layers(sorted(matrices))
    modules = {layer: architecture.rewrite_name(layer) for layer in matrices}
    for layer, name in modules.items():
        width = architecture.width(base, layer)
        if len(matrices[layer]) != width:
            raise ValueError(
                f"the matrix for layer {layer} is {len(matrices[layer])} wide, but {name} of this "
                f"model takes {width}; these statistics are of another model"
            )
        said = named.get(layer, "") or name
        if said.rpartition(".")[2] != name.rpartition(".")[2]:
            raise ValueError(
                f"the file for layer {layer} is of {said}, but edits of this model rewrite {name}; "
                "give the statistics of that module"
            )
    about["model"] = getattr(base.config, "_name_or_path", None) or None
    return modules, fingerprint(base, max(matrices), architecture), about
