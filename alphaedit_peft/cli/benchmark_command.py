"""``alphaedit benchmark``: seconds and memory of edits on a model, or on one of a known shape.

In: a model, or a shape to make one of with random weights; how many edits. Out: tables of times by
phase beside the least their arithmetic can take, or JSON. It does what
``alphaedit_peft.studies.benchmark`` does; the tables are ``benchmark_tables``'s.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alphaedit_peft.cli import printing
from alphaedit_peft.cli.arguments import (
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    LayersOption,
    MomentsOption,
    NullSpaceOption,
    check_file,
    hush,
    load_model,
    load_moments,
    load_null_space,
    parse_layers,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from rich.table import Table

    from alphaedit_peft.config import AlphaEditConfig
    from alphaedit_peft.nullspace import KeyMoments, NullSpace
    from alphaedit_peft.studies.benchmark import Statistics, Subject


OBJECTIVES = ("alphaedit", "memit")


class Origin(str, Enum):
    """How statistics are made where none are given."""

    COLLECTED = "collected"
    RANDOM = "random"


class Requests(str, Enum):
    """Whose lengths made-up edits have."""

    COUNTERFACT = "counterfact"
    ZSRE = "zsre"


class Autocast(str, Enum):
    """What matrix products are made in, on weights of a wider dtype."""

    BFLOAT16 = "bfloat16"


class Curves(str, Enum):
    """How far curves go: to 1,000 rows and a width of 2,048, or to 10,000 and 14,336."""

    SMALL = "small"
    FULL = "full"


def benchmark(  # noqa: PLR0913
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A model's folder or Hub id, or 'embedded'."),
    ] = None,
    *,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Random weights of that shape: gpt2-xl, gpt-j-6b, llama-3-8b, lab-gpt2, "
            "lab-gptj, lab-llama, or a config.json."
        ),
    ] = None,
    edits: Annotated[int, typer.Option(min=1, help="In a batch.")] = 100,
    batches: Annotated[int, typer.Option(min=1, help="One on top of the other.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Of each run; medians are shown.")] = 1,
    requests: Annotated[
        Requests, typer.Option(help="Whose lengths the made-up edits have.")
    ] = Requests.COUNTERFACT,
    edits_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Edits of your own, one JSON a line.")
    ] = None,
    objective: Annotated[str, typer.Option(help="Of alphaedit and memit.")] = "alphaedit,memit",
    plain: Annotated[bool, typer.Option("--plain", help="Time the plain way too.")] = False,
    plain_edits: Annotated[
        int | None, typer.Option(min=1, help="That the plain way makes; else 10, or all if fewer.")
    ] = None,
    inference: Annotated[
        bool, typer.Option("--inference", help="Time forward passes with and without packs.")
    ] = False,
    curves: Annotated[
        Curves | None, typer.Option(help="Time solves over edits and widths; needs no model.")
    ] = None,
    floor: Annotated[bool, typer.Option(help="Count operations, in a run of its own.")] = True,
    statistics: Annotated[
        Origin, typer.Option(help="Made over random words, or drawn, which is quick.")
    ] = Origin.COLLECTED,
    statistics_tokens: Annotated[
        int | None, typer.Option(min=1, help="To collect; else twice the width.")
    ] = None,
    null_space: NullSpaceOption = None,
    key_moments: MomentsOption = None,
    layers: LayersOption = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Loss evaluations of an edit; else the paper's.")
    ] = None,
    stop_loss: Annotated[
        float, typer.Option(min=0.0, help="The loss at which an edit is done; 0: all steps run.")
    ] = 0.0,
    autocast: Annotated[
        Autocast | None, typer.Option(help="Target values by products in this dtype.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, edits and contexts.")] = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all figures there, as JSON.")
    ] = None,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time batches of edits: seconds by phase, memory, and the least the arithmetic can take.

    `alphaedit benchmark --shape lab-llama --edits 20 --plain --plain-edits 2`

    `alphaedit benchmark MODEL --edits 100 --repeats 3 --out benchmark.json`

    Settings are the paper's. No edit of a random model reaches the loss at which the paper stops,
    so every step is run unless --stop-loss says otherwise.
    """
    if (model is None) == (shape is None) and (model is not None or curves is None):
        raise typer.BadParameter("give either MODEL or --shape NAME, or --curves alone")
    objectives = _objectives(objective)
    plain_too = _plain_edits(plain, plain_edits, edits)
    rewrite_layers = parse_layers(layers)
    check_file("--out", out)

    from alphaedit_peft.edits import read_edits
    from alphaedit_peft.studies import benchmark as bench

    hush()
    say: Callable[[str], object] = printing.say if printing.watched() else (lambda text: None)
    facts: dict[str, Any] = {}
    parts: list[Any] = []
    if model is not None or shape is not None:
        plan = bench.Plan(edits, batches, repeats, objectives, plain_too, floor, inference)
        own = None if edits_file is None else plan.take(read_edits(edits_file))
        if "memit" in objectives and null_space is not None and key_moments is None:
            raise typer.BadParameter(
                "MEMIT needs key moments: give --key-moments too, or --objective alphaedit"
            )
        space, moments = load_null_space(null_space), load_moments(key_moments)
        config = bench.benchmark_config(
            rewrite_layers,
            steps=steps,
            stop_loss=stop_loss,
            autocast=None if autocast is None else autocast.value,
            seed=seed,
        )
        say("making the model" if model is None else "loading the model")
        subject = _subject(model, shape, config, dtype, device)
        made = own or bench.made_up_edits(subject.tokenizer, plan.needed, requests.value, seed)
        say("making statistics")
        given = _statistics(subject, statistics, statistics_tokens, space, moments)
        found = bench.benchmark(subject, given, made, plan, say)
        facts = {"requests": edits_file.name if edits_file else f"made up as {requests.value}"}
        facts |= found.to_json()
        parts += measured(facts)
    if curves is not None:
        grid = bench.SMALL if curves is Curves.SMALL else bench.FULL
        facts["curves"] = bench.growth(grid, _device(device), say).to_json()
        parts += curve_tables(facts["curves"])
    if out is not None:
        text = json.dumps(printing.finite(facts), indent=1, allow_nan=False)
        out.write_text(text + "\n", encoding="utf-8")
        parts.append(f"Written to {out}")
    printing.show(as_json, facts, *parts)


def _objectives(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in OBJECTIVES:
            raise typer.BadParameter(f"--objective {name!r} is neither alphaedit nor memit")
    return names


def _plain_edits(plain: bool, asked: int | None, edits: int) -> int:
    """How many edits the plain way makes, 0 without --plain."""
    if asked is None:
        return min(10, edits) if plain else 0
    if not plain:
        raise typer.BadParameter(f"--plain-edits {asked} is for the plain way; give --plain too")
    if asked > edits:
        raise typer.BadParameter(
            f"--plain-edits {asked} is more than the {edits} edits of a batch; give {edits} or "
            "fewer, or more --edits"
        )
    return asked


def _device(device: str | None) -> torch.device:
    import torch

    if device == "auto":
        raise ValueError("--device auto spreads a checkpoint; name one device for random weights")
    try:
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device {device!r} is no device of torch; use cpu or cuda") from error


def _subject(
    model: str | None,
    shape: str | None,
    config: AlphaEditConfig,
    dtype: Dtype,
    device: str | None,
) -> Subject:
    """The model that is measured: loaded, or made of a shape with random weights."""
    import torch

    from alphaedit_peft.studies import benchmark as bench

    if shape is None:
        assert model is not None, "one of the two is given"
        base, tokenizer = load_model(model, dtype, device)
        return bench.Subject(model, base.requires_grad_(False), tokenizer, config, False)
    found = bench.read_shape(shape)
    kind = torch.float32 if dtype is Dtype.AUTO else getattr(torch, dtype.value)
    made = bench.shape_config(found)
    base = bench.random_model(made, kind, _device(device), config.seed)
    if config.rewrite_layers is None and found.rewrite_layers is not None:
        config.rewrite_layers = list(found.rewrite_layers)
    name = shape if shape in bench.SHAPES else Path(shape).name
    return bench.Subject(name, base, bench.stand_in_tokenizer(made.vocab_size), config)


def _statistics(
    subject: Subject,
    origin: Origin,
    tokens: int | None,
    null_space: NullSpace | None,
    key_moments: KeyMoments | None,
) -> Statistics:
    """Statistics that were given, or made for this run."""
    from alphaedit_peft.studies import benchmark as bench

    if null_space is None and key_moments is None:
        if origin is Origin.RANDOM:
            return bench.random_statistics(subject, subject.config.seed)
        return bench.collect_statistics(subject, tokens, subject.config.seed)
    if null_space is None:
        assert key_moments is not None, "one of the two is given"
        null_space = key_moments.null_space(config=subject.config.resolve(subject.model)[0])
    return bench.Statistics(null_space, key_moments)


PHASES = ("contexts", "keys", "targets", "solve", "write", "score")
MEBI, GIGA = 2**20, 10**9
Values = Mapping[str, Any]


def measured(facts: Values) -> Iterator[Table | str]:
    """Everything that was measured on a model."""
    plan, model, machine = (facts["head"][name] for name in ("plan", "model", "machine"))
    yield _about(facts)
    title = f"Seconds for {printing.count(plan['edits'], 'edit')}; MiB: peak above what was there before"
    heads = ["run", *(f">{phase}" for phase in PHASES), ">total", ">MiB"]
    yield printing.table(title, heads, _rows(facts))
    yield from _remarks(facts)
    rates = ", ".join(f"{n} {rate / GIGA:.3g}" for n, rate in facts["rates"].items())
    place = machine.get("gpu", machine["processor"])
    yield (
        f"Matrix rates of this machine ({place}, {printing.count(machine['threads'], 'thread')}), "
        f"measured in this run, in 10^9 operations a second: {rates}"
    )
    rows = [[name, seconds] for name, seconds in facts["statistics"].items()]
    if rows:
        yield f"Statistics, made once a model: {facts['head']['statistics']}"
        yield printing.table("Seconds of statistics", ["what", ">seconds"], rows)
    if facts["inference"]:
        yield _inference(facts["inference"], model)


def _about(facts: Values) -> str:
    model, settings = facts["head"]["model"], facts["head"]["settings"]
    layers = ",".join(map(str, settings["rewrite_layers"]))
    cast = f", autocast {model['autocast']}" if model["autocast"] else ""
    weights = "random weights" if model["random"] else "its own weights"
    stop = settings["stop_loss"]
    runs = f"down to a loss of {stop:g}" if stop else "all of them run (stop_loss 0)"
    return (
        f"{model['name']}: {model['parameters'] / 1e6:,.1f}M parameters, {model['dtype']}{cast}, "
        f"{weights}; rewrite layers {layers}; {printing.count(settings['steps'], 'step')}, {runs}; "
        f"edits {facts['requests']}"
    )


def _rows(facts: Values) -> Iterator[list[Any]]:
    """A row for each batch, and beneath the first one its floor."""
    for session in facts["sessions"]:
        for number, batch in enumerate(session["batches"], start=1):
            yield _row(f"{session['objective']} {number}", batch["seconds"], batch)
            if number == 1 and session["floor"]:
                yield _row("  floor", session["floor"]["seconds"], session["floor"])
    plain = facts["plain"]
    if plain:
        yield _row("plain, scaled", plain["scaled"], plain)
        if plain["floor"]:
            yield _row("  floor", plain["scaled_floor"], {})


def _row(name: str, seconds: Mapping[str, float], found: Values) -> list[Any]:
    total = found.get("total", sum(seconds.values()))
    cells = [_seconds(seconds[phase]) if seconds.get(phase) else "" for phase in PHASES]
    memory = f"{found['memory'] / MEBI:,.0f}" if "memory" in found else ""
    return [name, *cells, _seconds(total), memory]


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _remarks(facts: Values) -> Iterator[str]:
    from alphaedit_peft.studies.benchmark.tables import ratio_in_words

    if facts["alphaedit_to_memit"]:
        yield f"AlphaEdit takes {ratio_in_words(facts['alphaedit_to_memit'])} times MEMIT's time."
    if facts["plain_to_ours"]:
        plain = facts["plain"]
        yield (
            f"The plain way takes {ratio_in_words(facts['plain_to_ours'])} times the time, without "
            "contexts; "
            f"its targets and keys are those of {printing.count(plain['edits'], 'edit')}, scaled to "
            f"{plain['of']}."
        )
    for session in facts["sessions"]:
        first, floor = session["batches"][0], session["floor"]
        if floor:
            rest = first["total"] - first["seconds"]["contexts"]
            yield (
                f"{session['objective']}: {_count(floor)} operations over {floor['tokens']:,.0f} "
                f"tokens through the model take at least {floor['total']:.3g} s at the matrix "
                f"rate; the batch takes {rest / floor['total']:.2f} times that, without contexts."
            )
        for batch in session["batches"]:
            if batch["rows"] < batch["edits"]:
                yield (
                    f"{session['objective']}: {batch['made']} of {batch['edits']} edits were made, "
                    f"in {batch['rows']} rows, so the times are of less work."
                )


def _count(floor: Values) -> str:
    total = sum(n for counts in floor["operations"].values() for n in counts.values())
    return f"{total:.3g}"


def _inference(forwards: Sequence[Values], model: Values) -> Table:
    base = forwards[0]["milliseconds"]
    rows = [
        [
            one["model"] + (f", rank {one['rank']}" if one["rank"] else ""),
            f"{one['milliseconds']:,.1f}",
            f"{one['tokens_per_second']:,.0f}",
            f"{one['milliseconds'] / base:.2f}",
        ]
        for one in forwards
    ]
    title = f"A forward pass of {forwards[0]['tokens']} tokens, {model['dtype']}"
    return printing.table(title, ["model", ">ms", ">tokens/s", ">to base"], rows)


def curve_tables(grown: Values) -> Iterator[Table]:
    """The points of the growth curve_tables."""
    grid = grown["grid"]
    titles = {
        "edits": f"A solve at d_in {grid['d_in']:,}, over rows in place",
        "widths": f"A solve with {grid['rows']:,} rows in place, over d_in",
        "depths": f"A batch at hidden size {grid['hidden'][0]}, over blocks",
        "hidden": f"A batch with {grid['depths'][0]} blocks, over the hidden size",
    }
    heads = [">at", "how", ">seconds", ">floor", ">kept, MiB", ">peak, MiB"]
    for name, title in titles.items():
        rows = [
            [
                f"{p['at']:,}",
                p["method"],
                _seconds(p["seconds"]),
                None if p["floor"] is None else _seconds(p["floor"]),
                f"{p['state'] / MEBI:,.1f}" if p["method"] != "batch" else None,
                f"{p['memory'] / MEBI:,.0f}",
            ]
            for p in grown["points"]
            if p["curve"] == name
        ]
        yield printing.table(title, heads, rows)
