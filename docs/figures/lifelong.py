"""Edit on and on, batch after batch: does the capacity warning come before the model breaks?

    python docs/figures/lifelong.py --results lifelong.json --out lifelong.png
    python docs/figures/lifelong.py --models embedded FOLDER ... --ridges none --results worlds.json
    python docs/figures/lifelong.py --ridges none --thresholds 0.005 0.1 --results rooms.json

By model, by prior_ridge (none: the paper's equation), by threshold: how much room the null space
has (auto: as the package decides, else the keys' energy in it). FOLDER is what
train_embedded_model.py --seed N wrote: a model of another world. What the results file holds is not
run again. Contexts are off, to save time. A row of the file is one judgement; "all" is a sample of
at most 200.
"""

import argparse
import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random
from time import process_time

from transformers import AutoModelForCausalLM, AutoTokenizer

from alphaedit_peft import AlphaEditConfig, NullSpace, embedded, get_alphaedit_model
from alphaedit_peft.embedded.world import World
from alphaedit_peft.evaluation import embedded_suite
from alphaedit_peft.evaluation.drift import text_divergence, text_perplexity
from alphaedit_peft.log_probs import Reader

TEXTS, SAMPLE, FADED, BROKEN = 50, 200, 0.9, 0.5
SHOWN = ("all", "oldest", "newest", "unedited", "used")


def load(folder: str):
    """A model, its tokenizer, and the world that it knows."""
    if folder == "embedded":
        return *embedded.load(), embedded.world()
    seed = json.loads(Path(folder, "training.json").read_text())["seed"]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder), World.from_seed(seed)


def run(folder: str, ridge: float | None, threshold: float | None, given: argparse.Namespace):
    """Edit facts batch after batch; yields a row after each batch."""
    size = given.batch_size
    base, tok, world = load(folder)
    config = AlphaEditConfig(num_contexts=0, prior_ridge=ridge)
    if threshold is not None:
        config = replace(config, threshold=threshold, threshold_mode="energy")
    space = NullSpace.from_texts(base, tok, world.texts(given.texts), config, progress=False)
    model = get_alphaedit_model(base, config, tokenizer=tok, null_space=space)
    suite = embedded_suite(len(world.facts), world=world, unedited=0, texts=TEXTS)
    edits, reader, start = suite.edits, Reader(model, tok), process_time()
    for done in range(size, given.edits + 1, size):
        report = model.edit(edits[done - size : done], progress=False)
        some = Random(0).sample(edits[:done], min(SAMPLE, done))
        asked = {"all": some, "oldest": edits[:size], "newest": edits[done - size : done]}
        pairs = {k: [(e.question, e.target_new) for e in v] for k, v in asked.items()}
        pairs["unedited"] = [(e.question, e.target_true) for e in edits[-SAMPLE:]]
        hits = {k: sum(r.recalled for r in reader.read(v)) / len(v) for k, v in pairs.items()}
        capacity = report.capacity
        yield {
            "model": Path(folder).name,
            "prior_ridge": ridge,
            "threshold": threshold,
            "edits": done,
            **{name: round(share, 4) for name, share in hits.items()},
            "perplexity": round(text_perplexity(reader, suite.texts).value, 3),
            "drift": round(text_divergence(reader, model.disable_adapter, suite.texts).value, 4),
            "used": round(max(part.used for part in capacity.layers), 4),
            "room": [part.room for part in capacity.layers],
            "growth": [round(part.growth, 2) for part in capacity.layers],
            "conflicts": max(part.conflicts for part in capacity.layers),
            "warned": bool(capacity.warning),
            "seconds": round(process_time() - start),
        }


def first(rows: list[dict], holds) -> str:
    """Edits at the first row for which something holds."""
    return next((str(row["edits"]) for row in rows if holds(row)), f"not by {rows[-1]['edits']}")


def summary(runs: dict[str, list[dict]]) -> str:
    """When the warning came, and when edits faded and the model broke."""
    lines = ["model, prior_ridge | warned | all < 90 % | unedited < 90 % | all < 50 %"]
    for name, rows in runs.items():
        found = (
            first(rows, lambda row: row["warned"]),
            first(rows, lambda row: row["all"] < FADED),
            first(rows, lambda row: row["unedited"] < FADED),
            first(rows, lambda row: row["all"] < BROKEN),
        )
        lines.append(" | ".join((name, *found)))
    return "\n".join(lines)


def draw(runs: dict[str, list[dict]], path: str) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(SHOWN), layout="constrained", figsize=(14, 3))
    for panel, name in zip(axes, SHOWN, strict=True):
        for label, rows in runs.items():
            panel.plot([r["edits"] for r in rows], [r[name] for r in rows], "o-", label=label)
        panel.set(title=name, xlabel="edits", ylim=(0, 1.03))
    axes[0].legend(title="model, prior_ridge", fontsize=7)
    figure.savefig(path, dpi=110)


def read(text: str) -> float | None:
    return None if text in ("none", "auto") else float(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["embedded"], metavar="FOLDER")
    ridges = [None, 0.1, 0.01, 0.0]
    parser.add_argument("--ridges", nargs="+", default=ridges, type=read, metavar="R")
    parser.add_argument("--thresholds", nargs="+", default=[None], type=read, metavar="T")
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--texts", type=int, default=3000, help="for the null space")
    parser.add_argument("--results", default="lifelong.json", type=Path)
    parser.add_argument("--out", help="picture to write; needs matplotlib")
    given = parser.parse_args()
    runs = json.loads(given.results.read_text()) if given.results.exists() else {}
    for folder, ridge, threshold in product(given.models, given.ridges, given.thresholds):
        name = f"{Path(folder).name}, {'none' if ridge is None else f'{ridge:g}'}"
        name += "" if threshold is None else f", threshold {threshold:g}"
        if name in runs:
            continue
        rows = []
        for row in run(folder, ridge, threshold, given):
            print(*row.values(), sep="\t", flush=True)
            rows.append(row)
        runs[name] = rows
        given.results.write_text(json.dumps(runs, indent=1) + "\n")
    print(summary(runs))
    if given.out:
        draw(runs, given.out)


if __name__ == "__main__":
    main()
