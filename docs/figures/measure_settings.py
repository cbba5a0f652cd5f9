"""Settings side by side: what each does to 100 edits of a model in one batch.

    python docs/figures/measure_settings.py --out FILE.json [--models FOLDER ...] [--edits 100]
    python docs/figures/measure_settings.py --models FOLDER --records FILE.json --corpus FILE.txt

FOLDER is `embedded`, or what train_embedded_model.py --seed N wrote: a model of another world. With
records, it is any model: the first --edits of them are edits, the rest facts that should stay, and
key moments are of the corpus, whose last lines are held out. Figures are in the order of SHOWN.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import alphaedit_peft as ae
from alphaedit_peft import embedded
from alphaedit_peft.architecture import default_rewrite_layers
from alphaedit_peft.embedded.world import World
from alphaedit_peft.evaluation import Suite, embedded_suite, evaluate, facts_of, read_cases
from alphaedit_peft.nullspace import KeyMoments

AT = {"threshold_mode": "energy", "threshold": 0.02}
SETTINGS = {
    "auto": {},
    "paper's numbers": {"preset": "paper", "rewrite_layers": [0, 1], "threshold": 0.02},
    "rate 0.3, stop at 0.05": AT | {"learning_rate": 0.3, "stop_loss": 0.05},
    "stop when likeliest": {"stop_when": "likeliest"},
    "threshold 0.002": AT | {"threshold": 0.002},
    "threshold 0.005": AT | {"threshold": 0.005},
    "threshold 0.02": AT,
    "threshold 0.05": AT | {"threshold": 0.05},
    "threshold 0.1": AT | {"threshold": 0.1},
    "threshold 0.2": AT | {"threshold": 0.2},
    "ridge 0.01": {"ridge": 0.01, "ridge_mode": "relative"},
    "ridge 0.5": {"ridge": 0.5, "ridge_mode": "relative"},
    "no norm guard": {"norm_guard": 0.0},
    "shares by disturbance": {"layer_shares": "disturbance"},
    "blocks 1-2": {"rewrite_layers": [1, 2]},
    "blocks 0-2": {"rewrite_layers": [0, 1, 2]},
    "clamp 2": {"clamp_factor": 2.0},
    "blocks 0-2, clamp 2": {"rewrite_layers": [0, 1, 2], "clamp_factor": 2.0},
    "no contexts": {"num_contexts": 0},
    "no KL": {"kl_factor": 0.0},
    "anchors": {},
    "five batches": {},
    "five batches, repoured together": {},
}
SHOWN = "efficacy generalization specificity unedited_recall same_subject_recall perplexity".split()
HELD_OUT = 100


def load(folder: str, given: argparse.Namespace):
    """The model, its tokenizer, what to ask it, texts for its key moments, and its world if any."""
    if given.records:
        cases, _ = read_cases(given.records, limit=given.num_records)
        lines = [t for t in given.corpus.read_text(encoding="utf-8").splitlines() if t.strip()]
        lines = [line.replace("<unk>", "") for line in lines if len(line) > 100]
        edits, rest = cases[: given.edits], cases[given.edits :]
        suite = Suite(edits, facts_of(rest), lines[-HELD_OUT:])
        world, texts = None, lines[:-HELD_OUT]
    else:
        kept = None if folder == "embedded" else Path(folder, "training.json").read_text()
        world = World.from_seed(json.loads(kept)["seed"]) if kept else embedded.world()
        suite, texts = embedded_suite(given.edits, world=world), world.texts(12_000)
    if folder == "embedded":
        return *embedded.load(), suite, texts, world
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    return model, AutoTokenizer.from_pretrained(folder), suite, texts, world


def anchored(edit: ae.Edit, world: World | None) -> ae.Edit:
    """The edit, with one prompt of every other relation as an anchor."""
    if world is None:
        raise SystemExit("anchors are measured in a world whose relations are known; no records")
    others = [r.prompts[0] for r in world.relations if edit.prompt not in r.phrasings]
    return dataclasses.replace(edit, anchors=others)


def edited(base, tok, space, name, edits, world):
    """The model with a setting's edits, the seconds they took, and how many did not take."""
    config = ae.AlphaEditConfig(**SETTINGS[name])
    model = ae.get_alphaedit_model(base, config, tokenizer=tok, null_space=space)
    edits = [anchored(edit, world) for edit in edits] if name == "anchors" else edits
    start = time.process_time()
    size = max(1, len(edits) // 5) if name.startswith("five batches") else len(edits)
    report = model.edit(edits, batch_size=size, progress=False)
    if name.endswith("repoured together"):
        model.repour(together=True)
    seconds = round(time.process_time() - start, 1)
    return model, {"seconds": seconds, "not_taken": len(report.not_taken)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["embedded"], metavar="FOLDER")
    parser.add_argument("--settings", nargs="+", default=[*SETTINGS], choices=[*SETTINGS])
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--records", type=Path, help="CounterFact records, for other models")
    parser.add_argument("--num-records", type=int, default=300, help="read so many of them")
    parser.add_argument("--corpus", type=Path, help="text for key moments, with --records")
    parser.add_argument("--out", default="settings.json")
    given = parser.parse_args()
    found = []
    for folder in given.models:
        base, tok, suite, texts, world = load(folder, given)
        layers = {0, 1, 2, *default_rewrite_layers(base.config.num_hidden_layers)}
        every = ae.AlphaEditConfig(rewrite_layers=sorted(layers))
        moments = KeyMoments.collect(base, tok, texts, every, max_tokens=40_000, progress=False)
        for name in ["unedited", *given.settings]:
            row, model = {"model": Path(folder).name, "setting": name}, base
            if name != "unedited":
                full, _ = ae.AlphaEditConfig(**SETTINGS[name]).resolve(base)
                space = moments.null_space(full.threshold, full.threshold_mode)
                model, told = edited(base, tok, space, name, suite.edits, world)
                row |= told
            scores = evaluate(model, tok, suite)
            row |= {m: round(scores[m], 4) for m in SHOWN if m in scores.metrics}
            found.append(row)
            print(*row.values(), sep="\t", flush=True)
            base = model.unload() if name != "unedited" else base
            Path(given.out).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
