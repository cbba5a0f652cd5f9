"""Draw what merging costs: the share of an update that rounding changes, by dtype and size.

pip install matplotlib
alphaedit demo --out demo
python docs/figures/plot_serving.py embedded demo/pack docs/images/merge_rounding.png

The update is a pack's own, on its base's own weights, scaled to other sizes.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM

from alphaedit_peft import EditPack, embedded

INK = "#222222"
DTYPES = {"bfloat16": ("#c2410c", "o"), "float16": ("#1d4ed8", "s"), "float32": ("#4d7c0f", "^")}
SIZES = torch.logspace(-3, 0.5, 15, dtype=torch.float64)  # |D| / |W|


def rounding_error(weight: torch.Tensor, update: torch.Tensor, dtype: torch.dtype) -> float:
    """|round(W + D) - W - D| / |D|, for W (d_out, d_in) as it is in that dtype."""
    weight = weight.to(dtype).double()
    rounded = (weight + update).to(dtype).double()
    return float((rounded - weight - update).norm() / update.norm())


def draw(weight: torch.Tensor, update: torch.Tensor, edits: int, path: Path) -> None:
    """A line for each dtype, and a mark where the pack itself is."""
    figure, axes = plt.subplots(figsize=(6.4, 3.8))
    own = float(update.norm() / weight.norm())
    for name, (color, marker) in DTYPES.items():
        dtype = getattr(torch, name)
        errors = [rounding_error(weight, update * size / own, dtype) for size in SIZES]
        axes.loglog(SIZES, errors, color=color, label=name)
        axes.loglog([own], [rounding_error(weight, update, dtype)], marker, color=color)
    axes.axhline(0.1, color=INK, linewidth=0.8, linestyle=":")
    axes.text(SIZES[-1], 0.13, "merge() warns", ha="right", fontsize=9, color=INK)
    axes.set_xlabel(f"|D| / |W|, size of the update (marks: a pack of {edits} edits)", color=INK)
    axes.set_ylabel("|round(W + D) - W - D| / |D|", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder, Hub id, or 'embedded'")
    parser.add_argument("pack", help="folder or Hub id of a pack made for it")
    parser.add_argument("out", type=Path, help="picture to write")
    given = parser.parse_args()
    where = embedded.folder() if given.model == "embedded" else given.model
    base, pack = AutoModelForCausalLM.from_pretrained(where), EditPack.from_pretrained(given.pack)
    name, delta = next(iter(pack.factors.items()))
    dense = (delta.dense().T if pack.fan_in_fan_out else delta.dense()).double()
    draw(base.get_submodule(name).weight.detach().double(), dense, len(pack.edits), given.out)
