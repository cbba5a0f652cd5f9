"""Draw what the demo measured: probabilities before and after the edits, question by question.

pip install matplotlib
alphaedit demo --json > demo.json
python docs/figures/plot_demo.py demo.json docs/images/demo.png
"""

import argparse
import json
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt

PANELS = {
    "edit": ("edited prompts", "new"),
    "paraphrase": ("paraphrases", "new"),
    "same subject": ("other facts of\nthe same people", "true"),
    "bystander": ("the same fact of\nother people", "true"),
}
INK, LINE, MEAN = "#222222", "#9aa5b1", {"new": "#c2410c", "true": "#1d4ed8"}


def draw(values: dict, path: Path) -> None:
    """One panel a kind of question; a thin line is a question, the thick one their mean."""
    figure, panels = plt.subplots(1, len(PANELS), figsize=(9, 3.2), sharey=True)
    for panel, (kind, (title, target)) in zip(panels, PANELS.items(), strict=True):
        pairs = [
            [question["answers"][state][f"probability_{target}"] for state in ("base", "edited")]
            for question in values["questions"]
            if question["kind"] == kind
        ]
        for pair in pairs:
            panel.plot((0, 1), pair, color=LINE, linewidth=0.8, alpha=0.6)
        middle = [mean(side) for side in zip(*pairs, strict=True)]
        panel.plot((0, 1), middle, color=MEAN[target], linewidth=2.5, marker="o")
        for x, y, side in zip((-0.1, 1.1), middle, ("right", "left"), strict=True):
            panel.text(x, y, f"{y:.2f}", ha=side, va="center", color=MEAN[target], fontsize=9)
        panel.set_title(f"{title}\n({len(pairs)} questions)", fontsize=10, color=INK)
        panel.set_xticks((0, 1), ("before", "after"))
        panel.set_xlim(-0.5, 1.5)
        panel.spines[["top", "right"]].set_visible(False)
    for panel, target in ((panels[0], "new"), (panels[2], "true")):
        panel.set_ylabel(f"P({target} answer)", color=MEAN[target])
    panels[0].set_ylim(-0.03, 1.03)
    figure.tight_layout()
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="what `alphaedit demo --json` printed")
    parser.add_argument("out", type=Path, help="picture to write")
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    draw(json.loads(given.demo.read_text(encoding="utf-8")), given.out)
