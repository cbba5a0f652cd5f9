"""``alphaedit benchmark``: seconds and memory of edits on a model, or on one of a known shape.

In: a model, or a shape to make one of with random weights; how many edits. Out: tables of times by
phase beside the least their arithmetic can take, or JSON. It does what
``alphaedit_peft.studies.benchmark`` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, BadParameter, Option

from alphaedit_peft.cli import arguments, printing
from alphaedit_peft.saving import replace_file
from alphaedit_peft.settings import about

if TYPE_CHECKING:
    import torch

    from alphaedit_peft.config import AlphaEditConfig
    from alphaedit_peft.nullspace import KeyMoments, NullSpace
    from alphaedit_peft.studies.benchmark import Statistics, Subject


OBJECTIVES = ("alphaedit", "memit")
Requests = Literal["counterfact", "zsre"]
Curves = Literal["small", "full"]  # to 1,000 rows and a width of 2,048, or to 10,000 and 14,336
Origin = Literal["collected", "random"]


def benchmark(  # noqa: PLR0913
    model: Annotated[
        str | None, Argument(metavar="[MODEL]", help="A model's folder or Hub id, or 'embedded'.")
    ] = None,
    *,
    shape: Annotated[
        str | None,
        Option(
            help="Random weights of that shape: gpt2-xl, gpt-j-6b, llama-3-8b, lab-gpt2, "
            "lab-gptj, lab-llama, or a config.json."
        ),
    ] = None,
    edits: Annotated[int, Option(min=1, help="In a batch.")] = 100,
    batches: Annotated[int, Option(min=1, help="One on top of the other.")] = 1,
    repeats: Annotated[int, Option(min=1, help="Of each run; medians are shown.")] = 1,
    requests: Annotated[
        Requests, Option(help="Whose lengths the made-up edits have.")
    ] = "counterfact",
    edits_file: Annotated[
        Path | None, Option(metavar="FILE", help="Edits of your own, as for edit.")
    ] = None,
    objective: Annotated[str, Option(help="Of alphaedit and memit.")] = "alphaedit,memit",
    plain: Annotated[bool, Option("--plain", help="Time the plain way too.")] = False,
    plain_edits: Annotated[
        int | None, Option(min=1, help="That the plain way makes; else 10, or all if fewer.")
    ] = None,
    inference: Annotated[
        bool, Option("--inference", help="Time forward passes with and without packs.")
    ] = False,
    curves: Annotated[
        Curves | None, Option(help="Time solves over edits and widths; needs no model.")
    ] = None,
    floor: Annotated[bool, Option(help="Count operations, in a run of its own.")] = True,
    statistics: Annotated[
        Origin, Option(help="Made over random words, or drawn, which is quick.")
    ] = "collected",
    statistics_tokens: Annotated[
        int | None, Option(min=1, help="To collect; else twice the width.")
    ] = None,
    null_space: arguments.NullSpaceOption = None,
    key_moments: arguments.MomentsOption = None,
    layers: arguments.LayersOption = None,
    steps: Annotated[
        int | None, Option(min=1, help="Loss evaluations of an edit; else the paper's.")
    ] = None,
    stop_loss: Annotated[
        float, Option(min=0.0, help=f"{about('stop_loss').capitalize()}; 0: all steps run.")
    ] = 0.0,
    autocast: Annotated[
        Literal["bfloat16"] | None, Option(help="Target values by products in this dtype.")
    ] = None,
    seed: Annotated[int, Option(help="Of weights, edits and contexts.")] = 0,
    out: Annotated[
        Path | None, Option(metavar="FILE", help="Write all figures there, as JSON.")
    ] = None,
    dtype: arguments.DtypeOption = "auto",
    device: arguments.DeviceOption = None,
    as_json: arguments.JsonOption = False,
) -> None:
    """Time batches of edits: seconds by phase, memory, and the least the arithmetic can take.

    `alphaedit benchmark --shape lab-llama --edits 20 --plain --plain-edits 2`

    `alphaedit benchmark MODEL --edits 100 --repeats 3 --out benchmark.json`

    Settings are the paper's. No edit of a random model reaches the loss at which the paper stops,
    so every step is run unless --stop-loss says otherwise.
    """
    if (model is None) == (shape is None) and (model is not None or curves is None):
        raise BadParameter("give either MODEL or --shape NAME, or --curves alone")
    objectives = _objectives(objective)
    plain_too = _plain_edits(plain, plain_edits, edits)
    rewrite_layers = arguments.parse_layers(layers)
    arguments.check_file("--out", out)

    from alphaedit_peft.edits import read_edits
    from alphaedit_peft.studies import benchmark as measuring
    from alphaedit_peft.studies.benchmark import pages

    arguments.hush()
    facts: dict[str, Any] = {}
    parts: list[Any] = []
    if model is not None or shape is not None:
        plan = measuring.Plan(edits, batches, repeats, objectives, plain_too, floor, inference)
        own = None if edits_file is None else plan.take(read_edits(edits_file))
        if "memit" in objectives and null_space is not None and key_moments is None:
            raise BadParameter(
                "MEMIT needs key moments: give --key-moments too, or --objective alphaedit"
            )
        space, moments = arguments.load_null_space(null_space), arguments.load_moments(key_moments)
        config = measuring.benchmark_config(
            rewrite_layers, steps=steps, stop_loss=stop_loss, autocast=autocast, seed=seed
        )
        printing.progress("making the model" if model is None else "loading the model")
        subject = _subject(model, shape, config, dtype, device)
        made = own or measuring.made_up_edits(subject.tokenizer, plan.needed, requests, seed)
        printing.progress("making statistics")
        given = _statistics(subject, statistics, statistics_tokens, space, moments)
        found = measuring.benchmark(subject, given, made, plan, printing.progress)
        facts = {"requests": edits_file.name if edits_file else f"made up as {requests}"}
        facts |= found.to_json()
        parts += pages.measured(facts)
    if curves is not None:
        grid = measuring.SMALL if curves == "small" else measuring.FULL
        facts["curves"] = measuring.growth(grid, _device(device), printing.progress).to_json()
        parts += pages.grown(facts["curves"])
    if out is not None:
        replace_file(out, printing.json_text(facts))
        parts.append(f"Written to {out}")
    shown = (part if isinstance(part, str) else printing.table(part[0], *part[1]) for part in parts)
    printing.show(as_json, facts, *shown)


def _objectives(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in OBJECTIVES:
            raise BadParameter(f"--objective {name!r} is neither alphaedit nor memit")
    return names


def _plain_edits(plain: bool, asked: int | None, edits: int) -> int:
    """How many edits the plain way makes, 0 without --plain."""
    if asked is None:
        return min(10, edits) if plain else 0
    if not plain:
        raise BadParameter(f"--plain-edits {asked} is for the plain way; give --plain too")
    if asked > edits:
        raise BadParameter(
            f"--plain-edits {asked} is more than the {edits} edits of a batch; give {edits} or "
            "fewer, or more --edits"
        )
    return asked


def _device(device: str | None) -> torch.device:
    import torch

    if device == "auto":
        raise ValueError("--device auto spreads a checkpoint; name one device for random weights")
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    arguments.check_device(chosen)
    return torch.device(chosen)


def _subject(
    model: str | None,
    shape: str | None,
    config: AlphaEditConfig,
    dtype: arguments.Dtype,
    device: str | None,
) -> Subject:
    """The model that is measured: loaded, or made of a shape with random weights."""
    import torch

    from alphaedit_peft.studies import benchmark as measuring

    if shape is None:
        assert model is not None, "one of the two is given"
        base, tokenizer = arguments.load_model(model, dtype, device)
        return measuring.Subject(model, base.requires_grad_(False), tokenizer, config, False)
    found = measuring.read_shape(shape)
    kind = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    made = measuring.shape_config(found)
    base = measuring.random_model(made, kind, _device(device), config.seed)
    if config.rewrite_layers is None and found.rewrite_layers is not None:
        config.rewrite_layers = list(found.rewrite_layers)
    name = shape if shape in measuring.SHAPES else Path(shape).name
    return measuring.Subject(name, base, measuring.stand_in_tokenizer(made.vocab_size), config)


def _statistics(
    subject: Subject,
    origin: Origin,
    tokens: int | None,
    null_space: NullSpace | None,
    key_moments: KeyMoments | None,
) -> Statistics:
    """Statistics that were given, or made for this run."""
    from alphaedit_peft.studies import benchmark as measuring

    if null_space is None and key_moments is not None:
        null_space = key_moments.null_space(config=subject.config.resolve(subject.model)[0])
    if null_space is not None:
        return measuring.Statistics(null_space, key_moments)
    if origin == "random":
        return measuring.random_statistics(subject, subject.config.seed)
    return measuring.collect_statistics(subject, tokens, subject.config.seed)
