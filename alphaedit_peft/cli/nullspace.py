"""``alphaedit nullspace``: a corpus through a model, once, and what edits must not disturb out.

In: a model and texts. Out: a NullSpace folder, and the key moments where asked for. It does what
``KeyMoments.collect`` and ``NullSpace.from_moments`` do.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alphaedit_peft.cli import show
from alphaedit_peft.cli.loading import EMBEDDED, load_model
from alphaedit_peft.cli.options import (
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    LayersOption,
    ModelArgument,
    OutOption,
    check_folder,
    parse_layers,
)

if TYPE_CHECKING:
    from rich.table import Table

    from alphaedit_peft.nullspace import NullSpace

EMBEDDED_TEXTS = 5000


def nullspace(  # noqa: PLR0913
    model: ModelArgument,
    *,
    out: OutOption,
    texts: Annotated[
        Path | None, typer.Option("--texts", metavar="FILE", help="A text file, one text a line.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", metavar="NAME", help="On the Hub: repo, repo:config[:split]."),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Of the dataset.")] = "text",
    layers: LayersOption = None,
    threshold: Annotated[
        float | None, typer.Option(help="Which eigenvalues count as zero; the preset's by default.")
    ] = None,
    threshold_mode: Annotated[
        str | None, typer.Option(help="absolute, relative, energy or rank.")
    ] = None,
    preset: Annotated[str, typer.Option(help="auto or paper.")] = "auto",
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many; ten times d_in is a minimum.")
    ] = None,
    tokens_per_batch: Annotated[int, typer.Option(min=1, help="Bounds memory.")] = 8192,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep the sums here, and go on from them if they exist."),
    ] = None,
    moments_out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the full moments too: MEMIT, other thresholds."),
    ] = None,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure which directions preserved knowledge leaves free; done once for a model.

    `alphaedit nullspace gpt2-xl --dataset wikimedia/wikipedia:20231101.en --preset paper
    --max-tokens 1000000 --resume sums.safetensors --out ns`

    `alphaedit nullspace embedded --out ns` (its own texts by default)

    Others' null spaces: `alphaedit nullspace push --help`, `alphaedit nullspace pull --help`.
    """
    wanted = parse_layers(layers)
    for folder in filter(None, (out, moments_out)):
        check_folder(folder)
    corpus = _corpus(model, texts, dataset)

    from alphaedit_peft import AlphaEditConfig, KeyMoments

    config = AlphaEditConfig(
        preset=preset,
        rewrite_layers=wanted,
        threshold=threshold,
        threshold_mode=threshold_mode,
        tokens_per_batch=tokens_per_batch,
    )
    base, tokenizer = load_model(model, dtype, device)
    moments = KeyMoments.collect(
        base,
        tokenizer,
        corpus,
        config,
        max_tokens=max_tokens,
        progress=show.watched(),
        resume=resume,
        text_column=text_column,
    )
    if texts is None and dataset is None:
        moments = replace(moments, provenance={**moments.provenance, "corpus": "its own texts"})
    if moments_out is not None:
        moments.save_pretrained(moments_out)
    found = moments.null_space(config=config.resolve(base)[0])
    found.save_pretrained(out)
    facts = {"out": str(out), **describe(found)}
    if moments_out is not None:
        facts["moments_out"] = str(moments_out)
    show.show(as_json, facts, summary_table(found), f"Written to {out}")


def describe(found: NullSpace) -> dict[str, Any]:
    """A null space as plain JSON values."""
    layers = [row._asdict() for row in found.summary()]
    return {"tokens": found.tokens, "layers": layers, "provenance": dict(found.provenance)}


def summary_table(found: NullSpace) -> Table:
    """A null space as a table, one row a layer."""
    corpus = found.provenance.get("corpus", "an unknown corpus")
    return show.table(
        f"Null space from {found.tokens:,} tokens of {corpus}",
        [">layer", ">width", ">kept", ">of width", ">largest eigenvalue", ">threshold", "mode"],
        [
            (row.layer, row.width, row.kept, f"{row.kept / row.width:.0%}", *row[3:])
            for row in found.summary()
        ],
    )


def _corpus(model: str, texts: Path | None, dataset: str | None) -> Any:
    if texts is not None and dataset is not None:
        raise typer.BadParameter("give --texts or --dataset, not both")
    if texts is not None:
        if not texts.is_file():
            raise FileNotFoundError(f"--texts {texts} is no file; give a text file")
        return str(texts)
    if dataset is not None:
        return dataset
    if model != EMBEDDED:
        raise typer.BadParameter(f"give --texts FILE or --dataset NAME for model {model!r}")

    from alphaedit_peft import embedded

    return embedded.texts(EMBEDDED_TEXTS)
