"""Arguments and options that several commands share, and what they are read into.

In: words of a command line. Out: values, checked before hours of work; models, null spaces and
cases by their names. torch and transformers are imported only when something is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, BadParameter, Option

from alphaedit_peft import saving
from alphaedit_peft.cli import printing
from alphaedit_peft.messages import cut, shown
from alphaedit_peft.records import parse_json

if TYPE_CHECKING:
    from alphaedit_peft.evaluation import Suite
    from alphaedit_peft.fingerprint import BaseFingerprint
    from alphaedit_peft.nullspace import KeyMoments, NullSpace
    from alphaedit_peft.pack.files import StoredPack

EMBEDDED = "embedded"
EMBEDDED_CASES = 50
LONGEST_NUMBER = 4  # digits of a block's number
STATISTICS_TEXTS = 2500  # of the embedded world, where a command makes its statistics
PAGES = (".html", ".htm")

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Target = Literal["answers", "alt"]

ModelArgument = Annotated[
    str, Argument(metavar="MODEL", help="A model's folder or Hub id, or 'embedded'.")
]
PackArgument = Annotated[str, Argument(metavar="PACK", help="A pack's folder or Hub id.")]
OutOption = Annotated[Path, Option(metavar="DIR", help="Folder to write.")]
PageOption = Annotated[Path | None, Option(metavar="PAGE.html", help="Write a page to look at.")]
DtypeOption = Annotated[Dtype, Option(help="Of the weights in memory; auto: the checkpoint's own.")]
DeviceOption = Annotated[
    str | None,
    Option(help="cpu, cuda, cuda:1, or auto to spread it; by default cuda where there is."),
]
JsonOption = Annotated[bool, Option("--json", help="Print JSON instead of tables.")]
LayersOption = Annotated[
    str | None, Option(help="Blocks to rewrite, such as 4,5,6 or 4-8; else by the preset.")
]
NullSpaceOption = Annotated[
    str | None, Option(metavar="DIR", help="What 'alphaedit nullspace' wrote, or a Hub id.")
]
MomentsOption = Annotated[
    Path | None, Option(metavar="DIR", help="Key moments, for objective memit.")
]
DataOption = Annotated[
    str | None,
    Option(
        metavar="FILE",
        help="Cases: CounterFact, MQuAKE, zsRE, KnowEdit, EasyEdit's or edits; or 'embedded'.",
    ),
]
SplitOption = Annotated[
    str | None, Option(help="Read --data as a dataset (Hub id or folder), and this of it.")
]
TargetOption = Annotated[Target, Option(help="For zsRE: which answer is taught.")]
SnippetsOption = Annotated[
    Path | None,
    Option(metavar="FILE", help="CounterFact's attribute_snippets.json, which consistency needs."),
]
TextsOption = Annotated[
    Path | None, Option(metavar="FILE", help="Texts for perplexity, one a line.")
]
GenerateOption = Annotated[
    bool, Option("--generate", help="Let the model write too: fluency, consistency; slow.")
]


def parse_layers(text: str | None) -> list[int] | None:
    """Block numbers from ``4,5,6`` or ``4-8``; anything else is refused."""
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise BadParameter(f"--layers {text!r} is not a list such as 4,5,6 or 4-8")
        if max(len(first), len(last)) > LONGEST_NUMBER:
            raise BadParameter(f"--layers {shown(text)} names blocks that no model has")
        layers += range(int(first), int(last or first) + 1)
    if not layers:
        raise BadParameter(f"--layers {text!r} counts backwards; write 4-8")
    return layers


def parse_value(text: str) -> Any:
    """The VALUE of ``--set``: JSON, else the text itself."""
    try:
        return parse_json(text)
    except ValueError:
        return text


def check_folder(path: Path) -> None:
    """Refuse an output folder that cannot be one, before hours of work, and take it until the end.

    Raises:
        FileExistsError: the path, or one above it, is a file.
        ValueError: it is, or holds, the working directory.
        BlockingIOError: another command writes it.
        PermissionError: nothing can be written there.
    """
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise FileExistsError(f"{place} is a file; {path} has to be a folder")
    saving.check_folder(path)
    if path.is_dir() and not os.access(path, os.W_OK):
        raise PermissionError(f"{path}: nothing may be written there; name another")
    if os.environ.get("RANK", "0") == "0":
        printing.until_the_end(saving.alone(path))


def check_file(option: str, path: Path | None, suffixes: Sequence[str] = ()) -> None:
    """Refuse a file that cannot be written, or has none of the suffixes, before any work."""
    if path is None:
        return
    if path.is_dir():
        raise BadParameter(f"{option} {str(path)!r} is a folder; name a file")
    if suffixes and path.suffix.lower() not in suffixes:
        raise BadParameter(f"{option} {str(path)!r} must be a file's name in {suffixes[0]}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option} {path}: there is no folder {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"{option} {path}: nothing may be written there; name another")


def data_for(model: str, data: str | None) -> str:
    """The data that were named; the embedded world's for its own model, and for no other."""
    if data is None and model != EMBEDDED:
        raise BadParameter("give --data FILE")
    return data or EMBEDDED


def check_ways(data: str | None, split: str | None, target: Target, snippets: Path | None) -> None:
    """Refuse ways of reading records where no records are read."""
    ways = {"--split": split, "--snippets": snippets}
    ways["--target"] = None if target == "answers" else target
    given = [f"{name} {value}" for name, value in ways.items() if value is not None]
    if given and data in (None, EMBEDDED):
        raise BadParameter(f"{given[0]} is for records; give them with --data")


def read_suite(
    data: str,
    limit: int | None,
    rest: int = 0,
    *,
    split: str | None = None,
    target: Target = "answers",
    snippets: Path | None = None,
) -> Suite:
    """Cases and what stands around them; ``rest`` more records give facts that should stay.

    Raises:
        BadParameter: options that ``data`` has no use for.
        ValueError: as ``read_cases``, or fewer cases than asked for.
    """
    from alphaedit_peft.evaluation import Suite, embedded_suite, facts_of, read_cases

    check_ways(data, split, target, snippets)
    if data == EMBEDDED:
        return embedded_suite(limit or EMBEDDED_CASES)
    most = None if limit is None else limit + rest
    cases, report = read_cases(data, split=split, limit=most, target=target, snippets=snippets)
    if rest and limit is not None and len(cases) < limit:
        raise ValueError(f"{data} holds {len(cases)} distinct cases, fewer than the {limit} wanted")
    printing.say(" ".join(str(report).split()))
    return Suite(cases[:limit], facts_of(cases[limit:] if limit else ()))


def read_lines(path: Path | None) -> tuple[str, ...]:
    """The texts of a file that are not blank, one a line; none without a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: one that is no text.
    """
    if path is None:
        return ()
    from alphaedit_peft.nullspace.corpus import file_texts

    return tuple(text.rstrip("\r\n") for text in file_texts(str(path)) if text.strip())


def load_model(model: str, dtype: Dtype, device: str | None) -> tuple[Any, Any]:
    """A causal language model and its tokenizer.

    Raises:
        ValueError: a model or dtype or device that cannot be loaded.
        OSError: the Hub does not give it, with the reason.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from alphaedit_peft import parallel
    from alphaedit_peft.hub import refusal
    from alphaedit_peft.progress import counting

    hush()
    parallel.count()  # of several processes, each gets a GPU of its own
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_model(model)
    check_device(device)
    if model == EMBEDDED:
        from alphaedit_peft import embedded

        wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        base, tokenizer = embedded.load(wanted)
        return base.to("cpu" if device == "auto" else device), tokenizer  # type: ignore[arg-type]
    try:
        with counting(f"loading {model}", 1, "model", bar=False):
            tokenizer = AutoTokenizer.from_pretrained(model)
            base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map=device)
    except Exception as error:  # each file format and the Hub have errors of their own
        if (told := refusal(f"model {model!r} was not downloaded", error)) is not None:
            raise told from error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"model {model!r} cannot be loaded: {reason}") from error
    return base.eval(), tokenizer


def _check_model(model: str) -> None:
    """Refuse a place here that holds no model; what is not here may be on the Hub."""
    place = Path(model)
    if place.is_file():
        raise ValueError(f"model {shown(model)} cannot be loaded: it is a file; give its folder")
    names = ("config.json", "adapter_config.json")
    if place.is_dir() and not any((place / name).is_file() for name in names):
        raise ValueError(
            f"model {shown(model)} cannot be loaded: the folder holds no config.json; give one "
            "that save_pretrained wrote, or a Hub id"
        )


def check_device(device: str) -> None:
    """Refuse a device that torch does not know, or that this machine lacks."""
    import torch

    if device == "auto":
        return
    try:
        torch.empty(0, device=device)
    except Exception as error:  # torch has several, some of many lines
        why = str(error).strip().partition("\n")[0].partition(" device type at start")[0]
        raise ValueError(
            f"--device {shown(device)} cannot be used: {cut(why, 200)}; name another, such as cpu"
        ) from error


def load_pack(base: Any, pack: str, resources: Mapping[str, Any] | None = None) -> Any:
    """The model with the edits of a folder or Hub id on it, as ``AlphaEditModel`` loads them.

    Raises:
        ValueError: a pack that stands on another, with what to do on the command line.
    """
    from alphaedit_peft import AlphaEditModel
    from alphaedit_peft.pack.parents import MissingParentError

    try:
        return AlphaEditModel.from_pretrained(base, pack, **(resources or {}))
    except MissingParentError as error:
        raise ValueError(
            f"{pack}: {error.missing} and acts as made only beside it; join the two first: "
            f"alphaedit join PARENT {pack} --out both"
        ) from error


def hush() -> None:
    """Switch off transformers' loading bars, and its and the Hub's advice, in this process."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()


def load_model_and_space(
    model: str, dtype: Dtype, device: str | None, null_space: str | None
) -> tuple[Any, Any, NullSpace | None]:
    """A model, its tokenizer, and the null space of a folder or Hub id, where one was given.

    Of several null spaces in one place, the one made for this model is taken, by fingerprint.
    Whether the place is there at all is found out before the model is loaded.

    Raises:
        FileNotFoundError: no such place, or no null space for this model in it.
        ValueError: as ``load_model``; a damaged null space; several that fit.
    """
    from alphaedit_peft.nullspace import NullSpace

    several = null_space is not None and _holds_several(null_space)
    only = None if several else load_null_space(null_space)
    base, tokenizer = load_model(model, dtype, device)
    if null_space is None or not several:
        return base, tokenizer, only
    own = fingerprint_of(base)
    return base, tokenizer, NullSpace.from_pretrained(null_space, fingerprint=own)


def _holds_several(path: str) -> bool:
    """Whether a folder or repository has null spaces in folders, to be chosen by fingerprint."""
    from alphaedit_peft.hub import fetch_folder
    from alphaedit_peft.nullspace.sharing import HEADER

    inside, root = f"*/{HEADER}", Path(path)
    if not root.exists():
        root = fetch_folder(path, (HEADER, inside))
    return any(root.glob(inside))


def fingerprint_of(base: Any) -> BaseFingerprint:
    """A model's fingerprint, up to the last block that is edited by default."""
    from alphaedit_peft import AlphaEditConfig
    from alphaedit_peft.fingerprint import fingerprint

    config, architecture = AlphaEditConfig().resolve(base)
    return fingerprint(base, max(config.rewrite_layers or [0]), architecture)


def load_null_space(path: str | None) -> NullSpace | None:
    """The null space of a folder or Hub id; None where none was given."""
    from alphaedit_peft.nullspace import NullSpace

    return None if path is None else NullSpace.from_pretrained(path)


def load_moments(path: Path | None) -> KeyMoments | None:
    """The key moments of a folder; None where none was given."""
    from alphaedit_peft.nullspace import KeyMoments

    return None if path is None else KeyMoments.from_pretrained(path)


def read_pack(pack: str) -> StoredPack:
    """The pack of a folder or Hub id, read without PEFT."""
    from alphaedit_peft.pack import files

    return files.read_pack(files.locate(pack), files.StoredPack)


def read_alone(pack: str, refusal: str, then: str = "") -> StoredPack:
    """As ``read_pack``, but a pack that stands on another is refused, with what to do about it."""
    from alphaedit_peft.pack.parents import require_alone

    read = read_pack(pack)
    join = f"join it with its parent first{then}: alphaedit join PARENT {pack} --out both"
    require_alone(read, refusal, join)
    return read
