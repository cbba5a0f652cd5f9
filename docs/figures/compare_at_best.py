"""AlphaEdit and MEMIT, each at its best, on CounterFact records, with the same target values.

    python docs/figures/compare_at_best.py MODEL counterfact.json --moments DIR --out FILE.json

The target values z of an edit do not depend on what the solve protects: they are optimised once,
and solved again for each setting, as `alphaedit compare --search` does with those of each method.
Settings are chosen on the first --search records and judged on --edits records from --half on, all
edits of either in one batch. DIR is what `alphaedit nullspace --moments-out DIR` wrote.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import alphaedit_peft as ae
from alphaedit_peft.evaluation import Suite, evaluate, read_cases
from alphaedit_peft.evaluation.summary import bootstrap
from alphaedit_peft.studies.compare import RIDGES, THRESHOLDS, WEIGHTS
from alphaedit_peft.studies.tune import Grid, Setting, Tried, Tuning

METHODS = {"alphaedit": "alphaedit", "memit": "memit"}  # name -> objective
NAMES = [f"{n}{r}" for n in ("efficacy", "generalization", "specificity") for r in ("", "_recall")]


def edited(base, tok, moments, suite):
    """The model with all edits in one batch, in MEMIT's way, its w as auto decides it."""
    config = ae.AlphaEditConfig(objective="memit", on_conflict="replace", capacity_bound=0)
    space = moments.null_space(0.02, "energy")
    given = {"tokenizer": tok, "null_space": space, "key_moments": moments}
    model = ae.get_alphaedit_model(base, config, **given)
    report = model.edit(suite.edits, batch_size=len(suite.cases), progress=False)
    return model, len(report.made)


def solved(model, tok, suite, method, setting):
    """What the model scores with the same target values in another setting."""
    model.alphaedit_config.objective = METHODS[method]
    for name, value in setting.changes().items():
        setattr(model.alphaedit_config, name, value)
    model.repour()
    found = Tried(setting, evaluate(model, tok, suite), None, len(model.edits))
    print(method, setting, *(f"{n} {found.scores[n]:.3f}" for n in NAMES), flush=True)
    return found


def apart(one, other):
    """By metric, how much higher it is in one of two judgements of the same cases, paired."""
    pairs = list(zip(one.scores.cases, other.scores.cases, strict=True))
    differences = {n: [a.metrics[n] - b.metrics[n] for a, b in pairs] for n in NAMES}
    return {n: bootstrap(values).to_json() for n, values in differences.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--moments", type=Path, required=True)
    parser.add_argument("--search", type=int, default=20)
    parser.add_argument("--edits", type=int, default=40)
    parser.add_argument("--half", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("at_best.json"))
    given = parser.parse_args()
    base = AutoModelForCausalLM.from_pretrained(given.model, dtype="float32").eval()
    tok, moments = (
        AutoTokenizer.from_pretrained(given.model),
        ae.KeyMoments.from_pretrained(given.moments),
    )
    cases, _ = read_cases(given.data)
    # four neighbours a case instead of ten, while settings are chosen
    probes = [replace(c, neighborhood=c.neighborhood[:4]) for c in cases[: given.search]]
    found = {"model": Path(given.model).name, "tokens": moments.tokens, "search": {}, "judged": {}}

    suite = Suite(probes)
    before = evaluate(base, tok, suite)
    model, _ = edited(base, tok, moments, suite)
    layers, unit = (
        tuple(model.alphaedit_config.rewrite_layers),
        model.alphaedit_config.moment_weight,
    )
    clamp = model.alphaedit_config.clamp_factor
    grid, best = Grid((layers,), (clamp,), RIDGES, THRESHOLDS, WEIGHTS), {}
    found["decided"] = [d for d in model.to_pack().decisions if d["name"] == "moment_weight"]
    for method, objective in METHODS.items():
        tried = []
        for solve in grid.solves(objective):
            if "moment_weight" in solve:
                solve = {"moment_weight": float(f"{unit * solve['moment_weight']:.2g}")}
            tried.append(solved(model, tok, suite, method, Setting(layers, clamp, **solve)))
        tuning = Tuning(tuple(tried), before, given.search)
        found["search"][method], best[method] = tuning.to_json(), tuning.recommended.setting
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    base = model.unload()

    suite = Suite(cases[given.half : given.half + given.edits])
    before = evaluate(base, tok, suite)
    model, made = edited(base, tok, moments, suite)
    judged = {name: solved(model, tok, suite, name, best[name]) for name in METHODS}
    found["judged"] = {name: one.to_json() for name, one in judged.items()}
    found["before"] = {name: before.metrics[name].to_json() for name in NAMES}
    found |= {"edits": made, "alphaedit - memit": apart(*judged.values())}
    given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
