"""AlphaEdit and MEMIT, each at its best, on CounterFact records, with the same target values.

    python docs/figures/compare_at_best.py MODEL counterfact.json --moments DIR --out FILE.json

All edits are one batch. Their target values do not depend on what the solve protects: they are
optimised once, and solved again for every setting, four of each method. Settings are chosen on the
first --search of the records and judged on the others. DIR is what `alphaedit nullspace
--moments-out DIR` wrote; --pack keeps the edits, so that a script that was stopped need not make
them again.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import alphaedit_peft as ae
from alphaedit_peft.evaluation import Suite, evaluate, read_cases
from alphaedit_peft.evaluation.summary import bootstrap
from alphaedit_peft.studies.tune import Grid, Setting, Tried, Tuning

OBJECTIVES = ("alphaedit", "memit")
TRIED = {"ridges": (0.05, 0.25), "thresholds": (0.02, 0.2), "weights": (0.25, 1.0, 4.0, 16.0)}
NAMES = [f"{n}{r}" for n in ("efficacy", "generalization", "specificity") for r in ("", "_recall")]


def edited(given, cases):
    """The model with all edits in one batch, its tokenizer, and the w that auto decides."""
    base = AutoModelForCausalLM.from_pretrained(given.model, dtype="float32").eval()
    moments = ae.KeyMoments.from_pretrained(given.moments)
    resources = {"tokenizer": AutoTokenizer.from_pretrained(given.model), "key_moments": moments}
    resources["null_space"] = moments.null_space(0.02, "energy")
    if given.pack.is_dir():
        model = ae.AlphaEditModel.from_pretrained(base, given.pack, **resources)
    else:
        config = ae.AlphaEditConfig(objective="memit", history=False, on_conflict="replace")
        model = ae.get_alphaedit_model(base, config, **resources)
        model.edit([case.edit for case in cases], batch_size=len(cases), progress=False)
        model.save_pretrained(given.pack)
    return model, resources["tokenizer"], model.alphaedit_config.moment_weight


def judged(model, tok, suite, objective, setting):
    """What the model scores with the same target values in a setting."""
    model.alphaedit_config.objective = objective
    for name, value in setting.changes().items():
        setattr(model.alphaedit_config, name, value)
    model.repour()
    found = Tried(setting, evaluate(model, tok, suite), None, len(model.edits))
    print(objective, setting, *(f"{n} {found.scores[n]:.3f}" for n in NAMES), flush=True)
    return found


def apart(one, other):
    """By metric, how much higher it is in one of two judgements of the same cases, paired."""
    pairs = list(zip(one.scores.cases, other.scores.cases, strict=True))
    differences = {n: [a.metrics[n] - b.metrics[n] for a, b in pairs] for n in NAMES}
    return {n: bootstrap(values).to_json() for n, values in differences.items()}


def table(found: dict) -> str:
    """What was judged, in percent, and the paired differences with their intervals, as Markdown."""
    heads = ["", "before", *OBJECTIVES, "alphaedit - memit"]
    lines = [heads, ["---"] * len(heads)]
    for name in NAMES:
        scores = [found["before"][name], *(found["judged"][o]["metrics"][name] for o in OBJECTIVES)]
        gap = [100 * found["alphaedit - memit"][name][key] for key in ("value", "low", "high")]
        shown = [f"{100 * score['value']:.1f}" for score in scores]
        lines.append([name, *shown, "{:+.1f} ({:+.1f} .. {:+.1f})".format(*gap)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--moments", type=Path, required=True)
    parser.add_argument(
        "--records", type=int, nargs=2, default=(100, 150), metavar=("FIRST", "END")
    )
    parser.add_argument("--search", type=int, default=20)
    parser.add_argument("--pack", type=Path, default=Path("at_best"))
    parser.add_argument("--out", type=Path, default=Path("at_best.json"))
    given = parser.parse_args()
    cases = read_cases(given.data)[0][slice(*given.records)]
    model, tok, unit = edited(given, cases)
    layers, clamp = (
        tuple(model.alphaedit_config.rewrite_layers),
        model.alphaedit_config.clamp_factor,
    )
    # four neighbours a case instead of ten, while settings are chosen
    probes = Suite([replace(c, neighborhood=c.neighborhood[:4]) for c in cases[: given.search]])
    rest = Suite(cases[given.search :])
    with model.disable_adapter():
        before = evaluate(model, tok, rest)
    found = {"model": Path(given.model).name, "edits": len(model.edits), "decided": unit}
    found |= {"before": {n: before.metrics[n].to_json() for n in NAMES}, "search": {}}
    best, grid = {}, Grid((layers,), (clamp,), **TRIED)
    for objective in OBJECTIVES:
        tried = []
        for solve in grid.solves(objective):
            if "moment_weight" in solve:
                solve = {"moment_weight": float(f"{unit * solve['moment_weight']:.2g}")}
            setting = Setting(layers, clamp, **solve)
            tried.append(judged(model, tok, probes, objective, setting))
        tuning = Tuning(tuple(tried), before, given.search)
        found["search"][objective] = tuning.to_json()
        best[objective] = tuning.recommended.setting
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    final = {name: judged(model, tok, rest, name, best[name]) for name in OBJECTIVES}
    found["judged"] = {name: one.to_json() for name, one in final.items()}
    found["alphaedit - memit"] = apart(*final.values())
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
