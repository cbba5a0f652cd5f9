"""Arguments and options that several commands share, and the values they are read into."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from alphaedit_peft import storing

PAGES = (".html", ".htm")
PageOption = Annotated[
    Path | None, typer.Option("--html", metavar="PAGE.html", help="Write a page to look at.")
]


class Dtype(str, Enum):
    """dtype of a model's weights in memory; ``auto`` is the checkpoint's own."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model's folder or Hub id, or 'embedded'.")
]
PackArgument = Annotated[str, typer.Argument(metavar="PACK", help="A pack's folder or Hub id.")]
OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write.")]
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", help="Of the weights in memory; auto: the checkpoint's own.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device", help="cpu, cuda, cuda:1, or auto to spread it; by default cuda where there is."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
LayersOption = Annotated[
    str | None,
    typer.Option("--layers", help="Blocks to rewrite, such as 4,5,6 or 4-8; else by the preset."),
]
NullSpaceOption = Annotated[
    str | None,
    typer.Option(
        "--null-space", metavar="DIR", help="What 'alphaedit nullspace' wrote, or a Hub id."
    ),
]
MomentsOption = Annotated[
    Path | None,
    typer.Option("--key-moments", metavar="DIR", help="Key moments, for objective memit."),
]


def parse_layers(text: str | None) -> list[int] | None:
    """Block numbers from ``4,5,6`` or ``4-8``.

    Raises:
        typer.BadParameter: anything else.
    """
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise typer.BadParameter(f"--layers {text!r} is not a list such as 4,5,6 or 4-8")
        layers += range(int(first), int(last or first) + 1)
    if not layers:
        raise typer.BadParameter(f"--layers {text!r} counts backwards; write 4-8")
    return layers


def check_folder(path: Path) -> None:
    """Refuse an output folder that cannot be one, before hours of work.

    Raises:
        FileExistsError: the path, or one above it, is a file.
        ValueError: it is, or holds, the working directory.
    """
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise FileExistsError(f"{place} is a file; --out {path} needs a folder")
    storing.check_folder(path)


def check_file(option: str, path: Path | None, suffixes: Sequence[str] = ()) -> None:
    """Refuse a file that cannot be written, before any work.

    Args:
        option: its name, for the sentence.
        path: None where it was not asked for.
        suffixes: that its name may have; none: any.

    Raises:
        typer.BadParameter: a folder, or a name without one of the suffixes.
        FileNotFoundError: a folder that is not there.
    """
    if path is None:
        return
    if path.is_dir():
        raise typer.BadParameter(f"{option} {str(path)!r} is a folder; name a file")
    if suffixes and path.suffix.lower() not in suffixes:
        raise typer.BadParameter(f"{option} {str(path)!r} must be a file's name in {suffixes[0]}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option} {path}: there is no folder {path.parent}; make it first")
