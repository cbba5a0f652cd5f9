"""Draw what 'alphaedit benchmark' wrote, and put its tables into a page.

python docs/figures/plot_benchmark.py docs/data/benchmark*.json --docs docs/benchmarks.md
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
from benchmark_tables import page_with, title

from alphaedit_peft.editing.runner import PHASES
from alphaedit_peft.studies.benchmark.pages import lines

CURVES = {"edits": "rows in place", "widths": "d_in", "depths": "blocks", "hidden": "hidden size"}


def draw_profile(models: list[dict], path: Path) -> None:
    """A bar for each batch and floor, stacked by phase."""
    figure = plt.figure(figsize=(12, 2 + 1.5 * len(models)), layout="constrained")
    for number, found in enumerate(models, start=1):
        panel = figure.add_subplot((len(models) + 1) // 2, 2, number)
        rows = lines(found)[::-1]
        for place, phase in enumerate(PHASES):
            widths = [row.seconds.get(phase, 0.0) for row in rows]
            left = [sum(row.seconds.get(p, 0.0) for p in PHASES[:place]) for row in rows]
            panel.barh(range(len(rows)), widths, left=left, label=phase)
        panel.set(title=title(found).replace(" made up", "\nmade up"), xlabel="seconds a batch")
        panel.set_yticks(range(len(rows)), [row.name for row in rows])
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=150)


def draw_growth(points: list[dict], path: Path) -> None:
    """Seconds and memory of each curve."""
    figure, panels = plt.subplots(2, 4, figsize=(13, 5), layout="constrained")
    for column, (curve, along) in enumerate(CURVES.items()):
        memory = ("state", 2**20, "MiB kept") if column < 2 else ("memory", 2**20, "MiB, peak")
        for row, (value, scale, label) in enumerate([("seconds", 1, "seconds"), memory]):
            for method in ("ours", "anew", "plain", "batch"):
                own = [p for p in points if (p["curve"], p["method"]) == (curve, method)]
                values = [p[value] / scale for p in own]
                panels[row, column].plot([p["at"] for p in own], values, label=method)
            panels[row, column].set(xlabel=along, ylabel=label, ylim=(0, None))
    panels[0][0].legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="+", help="what --out wrote")
    parser.add_argument("--images", type=Path, default=".", help="folder for the pictures")
    parser.add_argument("--docs", type=Path, help="page to put the tables into")
    given = parser.parse_args()
    found = [json.loads(path.read_text()) for path in given.data]
    if models := [one for one in found if "sessions" in one]:
        draw_profile(models, given.images / "benchmark_profile.png")
    if points := [point for one in found for point in one.get("curves", {}).get("points", [])]:
        draw_growth(points, given.images / "benchmark_growth.png")
    if page := given.docs:
        page.write_text(page_with(page.read_text(), models))
