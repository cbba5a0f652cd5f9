"""Draw the rows of packs on top of each other: which are a pack's own, and which it protects.

pip install matplotlib
python docs/figures/plot_rows.py packs/a packs/b docs/images/several_packs.png
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt

from alphaedit_peft import EditPack

INK = "#222222"
COLORS = {"own": "#1d4ed8", "protected": "#c2410c", "superseded": "#9aa5b1"}
MEANING = {
    "own": "own: an edit's key in A, and what it puts out in B",
    "protected": "protected: a parent's key, B keeps its output near zero",
    "superseded": "superseded: replaced by a later edit",
}


def draw(panel: plt.Axes, pack: EditPack, title: str) -> set[str]:
    """A line for each row: |a| to the left, |b| to the right, coloured by role."""
    delta = next(iter(pack.factors.values()))
    sizes = [delta.A.norm(dim=1), delta.B.norm(dim=0)]
    sizes = [size / size.max() for size in sizes]
    roles = {record.row: record.role for record in pack.records}
    for row in range(pack.rank):
        color = COLORS[roles[row]]
        panel.barh(row, -float(sizes[0][row]), 0.8, color=color)
        panel.barh(row, float(sizes[1][row]), 0.8, color=color)
    panel.axvline(0, color=INK, linewidth=0.8)
    panel.set(title=title, xlim=(-1.05, 1.05), yticks=range(pack.rank))
    panel.set_xticks((-0.5, 0.5), ("row of A", "column of B"))
    panel.spines[["top", "right", "left"]].set_visible(False)
    return set(roles.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packs", nargs="+", help="the lowest first")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    packs = {Path(name).name: EditPack.from_pretrained(name) for name in given.packs}
    size = (3.6 * len(packs), 1.4 + 0.2 * max(pack.rank for pack in packs.values()))
    figure, panels = plt.subplots(1, len(packs), figsize=size, squeeze=False, sharey=True)
    seen = set()
    for panel, (name, pack) in zip(panels[0], packs.items(), strict=True):
        below = [parent["name"] for parent in pack.parents if parent.get("operation") == "beside"]
        seen |= draw(panel, pack, name + (f", on top of {', '.join(below)}" if below else ""))
    panels[0][0].invert_yaxis()
    panels[0][0].set_ylabel("row", color=INK)
    keys = [plt.Rectangle((0, 0), 1, 1, color=COLORS[role]) for role in MEANING if role in seen]
    names = [MEANING[role] for role in MEANING if role in seen]
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.legend(keys, names, loc="lower center", frameon=False, fontsize=9)
    figure.savefig(given.out, dpi=150)
