"""Draw what a pack's folder holds: its files, the shapes of its factors, and one edit in them.

alphaedit demo --out demo
python docs/figures/draw_pack.py demo/pack docs/images/pack_format.png
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

from alphaedit_peft import EditPack

INK, QUIET, EDIT, PAPER = "#222222", "#6b7684", "#c2410c", "#eef2f7"


def tree(panel: plt.Axes, folder: Path) -> None:
    """The files with their sizes; the sidecar's after the others."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    for i, path in enumerate(sorted(files, key=lambda path: (len(path.parts), path))):
        size = (folder / path).stat().st_size
        panel.text(0, 0.85 - 0.12 * i, path.as_posix(), family="monospace", fontsize=9)
        panel.text(1, 0.85 - 0.12 * i, f"{size / 1e3:,.1f} kB", ha="right", color=QUIET, fontsize=9)


def matrix(panel: plt.Axes, left: float, wide: float, high: float, name: str, part: tuple) -> None:
    """A box whose top is at 0.78, with its name below, and a line in it: (x, y, width, height)."""
    panel.add_patch(Rectangle((left, 0.78 - high), wide, high, facecolor=PAPER, edgecolor=INK))
    panel.add_patch(Rectangle((left + part[0], 0.78 - high + part[1]), *part[2:], color=EDIT))
    panel.text(left + wide / 2, 0.75 - high, name, ha="center", va="top", fontsize=9)


def factors(panel: plt.Axes, pack: EditPack, row: int) -> None:
    """B (d_out, n), A (n, d_in) and z (n, d_model) of the first module, and an edit's place."""
    name, delta = next(iter(pack.factors.items()))
    (n, d_in), d_out, high = delta.A.shape, delta.B.shape[0], 0.25
    place, thin = high * (1 - (row + 1) / n), high / n
    matrix(panel, 0, 0.12, 0.5, f"B\n{d_out} x {n}", (0.12 * row / n, 0, 0.12 / n, 0.5))
    matrix(panel, 0.17, 0.55, high, f"A\n{n} x {d_in}", (0, place, 0.55, thin))
    matrix(panel, 0.79, 0.2, high, f"z\n{n} x {d_out}", (0, place, 0.2, thin))
    panel.text(0, 0.85, f"{name}: Delta = B A, rank {n}", fontsize=9)
    edit = next(record.edit for record in pack.records if record.row == row)
    what = f"row {row} of A and z, column {row} of B\n{edit.question} -> {edit.target_new.strip()}"
    panel.text(0.17, 0.22, what, fontsize=9, color=EDIT)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pack", type=Path, help="folder")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 2.6), width_ratios=(4, 6))
    tree(panels[0], given.pack)
    factors(panels[1], EditPack.from_pretrained(given.pack), row=2)
    for panel in panels:
        panel.set(ylim=(0.12, 0.92))
        panel.axis("off")
    figure.subplots_adjust(0.02, 0, 0.98, 1, wspace=0.1)
    figure.savefig(given.out, dpi=150)
