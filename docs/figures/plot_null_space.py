"""Draw a null space: each layer's eigenvalues, what is kept, and how far the threshold can move.

pip install matplotlib
alphaedit demo --out demo
python docs/figures/plot_null_space.py demo/null_space docs/images/null_space.png
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt

from alphaedit_peft import NullSpace

LINE, KEPT, INK, REACH = "#1d4ed8", "#bfdbfe", "#222222", 10


def draw(panel: plt.Axes, space: NullSpace, layer: int) -> None:
    """The eigenvalues in ascending order, the kept ones shaded."""
    values, kept = space.spectra[layer].sort().values, space.null_dimension(layer)
    panel.axvspan(0, kept, color=KEPT, linewidth=0)
    panel.semilogy((values / values[-1]).clamp_min(1e-9), color=LINE)
    for name, factor in (("t / reach", 1 / REACH), ("t reach", REACH)):
        end = space.with_threshold(space.threshold * factor).null_dimension(layer)
        panel.axvline(end, color=INK, linewidth=0.8, linestyle=":")
        panel.text(end, 2.5, f"{name}: {end}", ha="center", fontsize=8, color=INK)
    panel.text(kept - 12, 0.7, f"{kept} kept", ha="right", color=INK)
    panel.set(xlim=(0, len(values)), ylim=(1e-6, 2), xlabel="directions, by eigenvalue")
    panel.set_title(f"layer {layer}: {len(values)} directions", pad=20)
    panel.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("null_space", help=f"folder or Hub id, made with reach {REACH}")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    space = NullSpace.from_pretrained(given.null_space)
    shape = {"figsize": (4.4 * len(space.layers), 3.4), "layout": "constrained"}
    figure, panels = plt.subplots(1, len(space.layers), squeeze=False, sharey=True, **shape)
    for panel, layer in zip(panels[0], space.layers, strict=True):
        draw(panel, space, layer)
    panels[0][0].set_ylabel("eigenvalue of C0, relative to the largest", color=INK)
    figure.savefig(given.out, dpi=150)
