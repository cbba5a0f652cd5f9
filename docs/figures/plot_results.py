"""Draw what compare_editors.py found: metrics over the edits made, and how well edits last.

pip install matplotlib
python docs/figures/plot_results.py runs/results.json docs/images/results.png
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

PANELS = {
    "efficacy_recall": "edits: the new target is said",
    "generalization_recall": "paraphrases: likewise",
    "specificity_recall": "same fact of other people holds",
    "same_subject_recall": "other facts of edited people hold",
    "unedited_recall": "facts of people without edits hold",
}
COLOURS = {
    "alphaedit": "#c2410c",
    "memit": "#1d4ed8",
    "memit-history": "#60a5fa",
    "memit-projection": "#0f766e",
    "rome": "#7c3aed",
    "finetuning": "#6b7280",
}


def draw(values: dict, path: Path) -> None:
    """A line a method, a panel a metric; the last panel has edits by batch, at the end."""
    figure, axes = plt.subplots(2, 3, figsize=(10, 5.6), sharey=True)
    panels = list(axes.flat)
    for name, found in values["methods"].items():
        style = {"color": COLOURS.get(name), "label": name, "marker": "o", "markersize": 3}
        for panel, metric in zip(panels, PANELS, strict=False):
            course = found["course"].get(metric, [])
            shares = [100 * estimate["value"] for _, estimate in course]
            panel.plot([edits for edits, _ in course], shares, **style)
        retention = [100 * share for share in found["retention"]]
        panels[-1].plot(range(1, len(retention) + 1), retention, **style)
    for panel, title in zip(panels, PANELS.values(), strict=False):
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("edits made", fontsize=8)
    panels[-1].set_title("at the end: edits that still hold, by batch", fontsize=9)
    panels[-1].set_xlabel("batch, the first is the oldest", fontsize=8)
    for panel in panels:
        panel.set_ylim(-3, 103)
        panel.tick_params(labelsize=8)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.spines[["top", "right"]].set_visible(False)
    for row in axes:
        row[0].set_ylabel("percent", fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=6, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="what compare_editors.py wrote")
    parser.add_argument("out", type=Path, help="picture to write")
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    draw(json.loads(given.results.read_text(encoding="utf-8")), given.out)
