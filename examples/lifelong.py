"""Edit on and on, by the ridge of earlier rows: python examples/lifelong.py --out lifelong.png

Results that are there are drawn without editing anew. Contexts are off, to save time.
"""

import argparse
import json
from pathlib import Path
from random import Random

from matplotlib import pyplot as plt

from alphaedit_peft import AlphaEditConfig, NullSpace, embedded, get_alphaedit_model
from alphaedit_peft.evaluation import embedded_suite
from alphaedit_peft.evaluation.drift import text_perplexity
from alphaedit_peft.evaluation.reader import Reader

RIDGES, BATCH, SHOWN = (1.0, 0.01, 0.0), 100, ("all", "oldest", "newest", "unedited", "used")


def run(prior_ridge: float, count: int) -> list[dict]:
    base, tok = embedded.load()
    config = AlphaEditConfig(num_contexts=0, prior_ridge=prior_ridge, capacity_bound=0)
    space = NullSpace.from_texts(base, tok, embedded.texts(3000), config, progress=False)
    model = get_alphaedit_model(base, config, tokenizer=tok, null_space=space)
    edits, texts = embedded_suite(1824).edits, embedded.world().plain_sentences[:50]
    reader, found = Reader(model, tok), []
    for done in range(BATCH, count + 1, BATCH):
        report = model.edit(edits[done - BATCH : done], progress=False)
        some = Random(0).sample(edits[:done], min(200, done))
        asked = {"all": some, "newest": edits[done - BATCH : done], "oldest": edits[:BATCH]}
        pairs = {k: [(e.question, e.target_new) for e in v] for k, v in asked.items()}
        pairs["unedited"] = [(e.question, e.target_true) for e in edits[-200:]]
        hits = {k: sum(r.recalled for r in reader.read(v)) / len(v) for k, v in pairs.items()}
        hits["perplexity"] = text_perplexity(reader, texts).value
        hits["used"] = max(part.used for part in report.capacity.layers)
        found.append({"edits": done, **hits})
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="lifelong.png")
    parser.add_argument("--results", default="lifelong.json", type=Path)
    parser.add_argument("--edits", type=int, default=1000)
    given = parser.parse_args()
    if not given.results.exists():
        runs = {f"{ridge:g}": run(ridge, given.edits) for ridge in RIDGES}
        given.results.write_text(json.dumps(runs, indent=1))
    figure, axes = plt.subplots(1, 5, layout="constrained", figsize=(14, 3))
    for panel, name in zip(axes, SHOWN, strict=True):
        for ridge, rows in json.loads(given.results.read_text()).items():
            panel.plot([r["edits"] for r in rows], [r[name] for r in rows], "o-", label=ridge)
        panel.set(title=name, xlabel="edits", ylim=(0, 1.03))
    axes[0].legend(title="prior_ridge")
    figure.savefig(given.out, dpi=110)


if __name__ == "__main__":
    main()
