"""``alphaedit nullspace``: a corpus through a model, once, and what edits must not disturb out.

In: a model and texts. Out: a NullSpace folder, and the key moments where asked for. It does what
``KeyMoments.collect`` and ``NullSpace.from_moments`` do.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, BadParameter, Option

from alphaedit_peft.cli import arguments, printing
from alphaedit_peft.settings import about

if TYPE_CHECKING:
    from rich.table import Table

    from alphaedit_peft import KeyMoments, NullSpace


EMBEDDED_TEXTS = 5000
KINDS = (".npz", ".pt", ".safetensors")
ModeOption = Annotated[str | None, Option(help=f"{about('threshold_mode')}.")]
PresetOption = Annotated[str, Option(help="auto or paper.")]
MomentsOutOption = Annotated[
    Path | None, Option(metavar="DIR", help="Write the full moments too: MEMIT, other thresholds.")
]


def nullspace(  # noqa: PLR0913
    model: arguments.ModelArgument,
    *,
    out: arguments.OutOption,
    texts: Annotated[
        Path | None, Option(metavar="FILE", help="A text file, one text or JSON object a line.")
    ] = None,
    dataset: Annotated[
        str | None, Option(metavar="NAME", help="On the Hub: repo, repo:config[:split].")
    ] = None,
    text_column: Annotated[str, Option(help="Of the dataset, or of JSON objects.")] = "text",
    layers: arguments.LayersOption = None,
    threshold: Annotated[
        float | None, Option(help=f"{about('threshold').capitalize()}; the preset's by default.")
    ] = None,
    threshold_mode: ModeOption = None,
    preset: PresetOption = "auto",
    max_tokens: Annotated[
        int | None, Option(min=1, help="Stop after so many; ten times d_in are advised.")
    ] = None,
    tokens_per_batch: Annotated[int, Option(min=1, help="Bounds memory.")] = 8192,
    resume: Annotated[
        Path | None,
        Option(metavar="FILE", help="Keep the sums here, and go on from them if they exist."),
    ] = None,
    moments_out: MomentsOutOption = None,
    dtype: arguments.DtypeOption = "auto",
    device: arguments.DeviceOption = None,
    as_json: arguments.JsonOption = False,
) -> None:
    """Measure which directions preserved knowledge leaves free; done once for a model.

    `alphaedit nullspace gpt2-xl --dataset wikimedia/wikipedia:20231101.en --preset paper
    --max-tokens 1000000 --resume sums.safetensors --out ns`

    `alphaedit nullspace embedded --out ns` (its own texts by default)

    Others' null spaces: `alphaedit nullspace push --help`, `alphaedit nullspace pull --help`.
    """
    wanted = arguments.parse_layers(layers)
    for folder in {out, moments_out or out}:
        arguments.check_folder(folder)
    corpus = _corpus(model, texts, dataset, text_column)

    from alphaedit_peft import AlphaEditConfig, KeyMoments
    from alphaedit_peft.nullspace.threshold import ADVISED
    from alphaedit_peft.progress import span

    config = AlphaEditConfig(
        preset=preset,
        rewrite_layers=wanted,
        threshold=threshold,
        threshold_mode=threshold_mode,
        tokens_per_batch=tokens_per_batch,
    )
    base, tokenizer = arguments.load_model(model, dtype, device)
    begun = time.monotonic()
    with printing.kept(resume):
        moments = KeyMoments.collect(
            base,
            tokenizer,
            corpus,
            config,
            max_tokens=max_tokens,
            resume=resume,
            text_column=text_column,
        )
    if texts is None and dataset is None:
        moments = replace(moments, provenance={**moments.provenance, "corpus": "its own texts"})
    if moments_out is not None:
        moments.save_pretrained(moments_out)
    found = moments.null_space(config=config.resolve(base)[0])
    more: dict[str, Any] = {} if moments_out is None else {"moments_out": str(moments_out)}
    seconds, advised = time.monotonic() - begun, ADVISED * max(map(found.width, found.layers))
    then = f"alphaedit edit {quote(model)} edits.jsonl --null-space {quote(str(out))} --out pack"
    more |= {"seconds": seconds, "advised_tokens": advised, "next": then}
    enough = "enough" if found.tokens >= advised else "more are better"
    told = f"{found.tokens:,} tokens in {span(seconds)}; {advised:,} are advised: {enough}"
    write(found, out, as_json, more, told, f"Next: {then}")


def write(
    found: NullSpace,
    out: Path,
    as_json: bool,
    more: Mapping[str, Any] | None = None,
    *told: str,
) -> None:
    """Save a null space, and say what it is; ``more`` is for JSON alone, ``told`` for people."""
    found.save_pretrained(out)
    facts, table = described(found)
    facts = {"out": str(out), **facts, **(more or {})}
    printing.show(as_json, facts, table, f"Written to {out}", *told)


def described(found: NullSpace) -> tuple[dict[str, Any], Table]:
    """A null space as plain JSON values, and as a table of its layers."""
    layers, provenance = found.summary(), dict(found.provenance)
    title = f"{found.tokens:,} tokens of {provenance.get('corpus', 'an unknown corpus')}"
    columns = [">layer", ">width", ">kept", ">of width", ">largest eigenvalue", ">threshold"]
    rows = [(x.layer, x.width, x.kept, f"{x.kept / x.width:.0%}", *x[3:]) for x in layers]
    table = printing.table(f"Null space from {title}", [*columns, "mode"], rows)
    each = [layer._asdict() for layer in layers]
    return {"tokens": found.tokens, "layers": each, "provenance": provenance}, table


def _corpus(model: str, texts: Path | None, dataset: str | None, text_column: str) -> Any:
    if texts is not None and dataset is not None:
        raise BadParameter("give --texts or --dataset, not both")
    if texts is not None:
        if not texts.is_file():
            raise FileNotFoundError(f"--texts {texts} is no file; give a text file")
        from alphaedit_peft.nullspace.corpus import file_texts

        next(file_texts(str(texts), text_column), None)  # what is no text is refused at once
        return str(texts)
    if dataset is not None:
        return dataset
    if model != arguments.EMBEDDED:
        raise BadParameter(f"give --texts FILE or --dataset NAME for model {model!r}")

    from alphaedit_peft import embedded

    return embedded.texts(EMBEDDED_TEXTS)


def import_statistics(  # noqa: PLR0913
    files: Annotated[
        list[Path], Argument(metavar="FILE...", help="All .npz, or one .pt or .safetensors.")
    ],
    *,
    out: arguments.OutOption,
    layers: Annotated[
        str | None,
        Option(help="What the files are of, in their order, such as 4-8; .npz names tell it."),
    ] = None,
    model: Annotated[
        str | None,
        Option(metavar="MODEL", help="Check them against this model, and bind them to it."),
    ] = None,
    threshold: Annotated[
        float | None,
        Option(help=f"{about('threshold').capitalize()}; by default the preset's for MODEL."),
    ] = None,
    threshold_mode: ModeOption = None,
    preset: PresetOption = "auto",
    reach: Annotated[
        float, Option(help="How far the threshold can be moved later; 1 is the thinnest.")
    ] = 10.0,
    name: Annotated[
        str | None, Option(metavar="NAME", help="Of a matrix in .safetensors, '{}' for the layer.")
    ] = None,
    tokens: Annotated[
        int | None, Option(min=1, help="That went into a .safetensors file's matrices.")
    ] = None,
    summed: Annotated[
        bool, Option("--summed", help="Its matrices are sums over the tokens, not means.")
    ] = False,
    moments_out: MomentsOutOption = None,
    as_json: arguments.JsonOption = False,
) -> None:
    """Read statistics of ROME, MEMIT or AlphaEdit's own code.

    `alphaedit nullspace import stats/*_mom2_100000.npz --threshold 0.02 --threshold-mode absolute
    --out ns`

    `alphaedit nullspace import null_space_project.pt --layers 4-8 --out ns`

    `alphaedit nullspace import c.safetensors --layers 4-8 --name 'layers.{}.cov' --tokens 1000000
    --model MODEL --out ns`
    """
    kind = _kind(files)
    blocks = arguments.parse_layers(layers)
    for folder in {out, moments_out or out}:
        arguments.check_folder(folder)
    if kind != ".npz" and blocks is None:
        raise BadParameter(f"a {kind} file does not tell its layers; give --layers")
    if kind == ".safetensors" and (name is None or "{}" not in name or tokens is None):
        raise BadParameter("a .safetensors file needs --tokens and --name with '{}'")
    if kind == ".pt" and (threshold is not None or threshold_mode or moments_out):
        raise BadParameter(
            "a projector has neither threshold nor moments; leave --threshold and --moments-out out"
        )
    if kind != ".pt" and model is None and (threshold is None or threshold_mode is None):
        raise BadParameter(
            "give --threshold and --threshold-mode (the paper's code: 0.02, absolute), or --model"
        )

    from alphaedit_peft import AlphaEditConfig
    from alphaedit_peft.nullspace import read_covariances, read_projector, read_second_moments

    config = AlphaEditConfig(preset=preset, threshold=threshold, threshold_mode=threshold_mode)
    base = None if model is None else arguments.load_model(model, "auto", "cpu")[0]
    moments: KeyMoments | None = None
    if kind == ".pt":
        found = read_projector(files[0], blocks or [], model=base)
    else:
        if kind == ".npz":
            moments = read_second_moments(_by_layer(files, blocks), model=base)
        else:
            of_layer = {layer: str(name).replace("{}", str(layer)) for layer in blocks or []}
            moments = read_covariances(files[0], of_layer, tokens or 0, summed=summed, model=base)
        full = config if base is None else config.resolve(base)[0]
        found = moments.null_space(config=full, reach=reach)
    if moments is not None and moments_out is not None:
        moments.save_pretrained(moments_out)
    write(found, out, as_json)


def _kind(files: list[Path]) -> str:
    kinds = {path.suffix for path in files}
    kind = min(kinds)
    if len(kinds) > 1 or kind not in KINDS or (kind != ".npz" and len(files) > 1):
        names = ", ".join(path.name for path in files)
        raise BadParameter(f"{names}: give .npz files, or one .pt or .safetensors file")
    return kind


def _by_layer(files: list[Path], layers: list[int] | None) -> dict[int, Path] | list[Path]:
    if layers is None:
        return files
    if len(layers) != len(files) or len(set(layers)) != len(layers):
        raise BadParameter(f"--layers names {len(set(layers))} for {len(files)} files")
    return dict(zip(layers, files, strict=True))
