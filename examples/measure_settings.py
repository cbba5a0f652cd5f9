"""Settings side by side: what each does to 100 edits of the embedded model, or of its siblings.

    python examples/measure_settings.py --out settings.json [--models FOLDER ...] [--edits 100]

FOLDER is what train_embedded_model.py --seed N wrote: a model of another world. Figures are of the
edited model, in the order of SHOWN; docs/tuning.md has a table of them.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import alphaedit_peft as ae
from alphaedit_peft import embedded
from alphaedit_peft.embedded.world import World
from alphaedit_peft.evaluation import embedded_suite, evaluate
from alphaedit_peft.nullspace import KeyMoments

AT = {"threshold_mode": "energy", "threshold": 0.02}
SETTINGS = {
    "auto": {},
    "paper's numbers": {"preset": "paper", "rewrite_layers": [0, 1], "threshold": 0.02},
    "rate 0.3, stop at 0.05": AT | {"learning_rate": 0.3, "stop_loss": 0.05},
    "stop when likeliest": {"stop_when": "likeliest"},
    "threshold 0.002": AT | {"threshold": 0.002},
    "threshold 0.2": AT | {"threshold": 0.2},
    "ridge 0.01": {"ridge": 0.01, "ridge_mode": "relative"},
    "ridge 0.5": {"ridge": 0.5, "ridge_mode": "relative"},
    "no norm guard": {"norm_guard": 0.0},
    "shares by disturbance": {"layer_shares": "disturbance"},
    "blocks 1-2": {"rewrite_layers": [1, 2]},
    "no contexts": {"num_contexts": 0},
    "no KL": {"kl_factor": 0.0},
    "anchors": {},
}
SHOWN = "efficacy generalization specificity unedited_recall same_subject_recall perplexity".split()


def load(folder: str):
    if folder == "embedded":
        return *embedded.load(), embedded.world()
    world = World.from_seed(json.loads(Path(folder, "training.json").read_text())["seed"])
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder), world


def anchored(edit: ae.Edit, world: World) -> ae.Edit:
    """The edit, with one prompt of every other relation as an anchor."""
    others = [r.prompts[0] for r in world.relations if edit.prompt not in r.phrasings]
    return dataclasses.replace(edit, anchors=others)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["embedded"], metavar="FOLDER")
    parser.add_argument("--settings", nargs="+", default=[*SETTINGS], choices=[*SETTINGS])
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--out", default="settings.json")
    given = parser.parse_args()
    found = []
    for folder in given.models:
        base, tok, world = load(folder)
        suite = embedded_suite(given.edits, world=world)
        every = ae.AlphaEditConfig(rewrite_layers=[0, 1, 2])
        texts = world.texts(12_000)
        moments = KeyMoments.collect(base, tok, texts, every, max_tokens=40_000, progress=False)
        for name in ["unedited", *given.settings]:
            row, model = {"model": Path(folder).name, "setting": name}, base
            if name != "unedited":
                config = ae.AlphaEditConfig(**SETTINGS[name])
                full, _ = config.resolve(base)
                space = moments.null_space(full.threshold, full.threshold_mode)
                model = ae.get_alphaedit_model(base, config, tokenizer=tok, null_space=space)
                edits = suite.edits
                if name == "anchors":
                    edits = [anchored(edit, world) for edit in edits]
                start = time.process_time()
                report = model.edit(edits, progress=False)
                row["seconds"] = round(time.process_time() - start, 1)
                row["not_taken"] = len(report.not_taken)
            scores = evaluate(model, tok, suite)
            found.append(row | {metric: round(scores[metric], 4) for metric in SHOWN})
            print(*found[-1].values(), sep="\t", flush=True)
            base = model.unload() if name != "unedited" else base
            Path(given.out).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
