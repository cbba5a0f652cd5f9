"""Draw why packs are joined and not added, and what removing edits does to the others.

python examples/join_packs.py --folder packs
python docs/figures/plot_packs.py packs/first packs/second docs/images/packs.png
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from alphaedit_peft import EditPack
from alphaedit_peft.algebra import outputs

COLORS = ("#c2410c", "#1d4ed8")


def joining(one: EditPack, other: EditPack) -> dict[str, list[float]]:
    """How far each edit's output in its own pack is off in both packs together, by module."""
    both, off = EditPack.join([one, other]), {"added": [], "joined": []}
    for module in one.modules:
        factors = [pack.factors[module] for pack in (one, other)]
        for own in factors:
            wanted = outputs(own, own.A)  # (n, d_out)
            sums = {"added": sum(outputs(delta, own.A) for delta in factors)}
            sums["joined"] = outputs(both.factors[module], own.A)
            for name, found in sums.items():
                off[name] += ((found - wanted).norm(dim=1) / wanted.norm(dim=1)).tolist()
    return off


def removing(pack: EditPack, count: int) -> dict[str, list[float]]:
    """How far the other edits' outputs move when the first ``count`` rows go."""
    gone = [record.edit.id for record in pack.records if record.row < count]
    smaller, moved = pack.without(gone, max_share=1.0), {"columns dropped": [], "without": []}
    for module, delta in pack.factors.items():
        A, kept = delta.A[count:], type(delta)(delta.A[count:], delta.B[:, count:])
        wanted = outputs(delta, A)
        for name, left in (("columns dropped", kept), ("without", smaller.factors[module])):
            moved[name] += ((outputs(left, A) - wanted).norm(dim=1) / wanted.norm(dim=1)).tolist()
    return moved


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packs", nargs=2, help="of one base, made with one null space")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    one, other = map(EditPack.from_pretrained, given.packs)
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained", sharey=True)
    found = (joining(one, other), removing(one, max(1, one.rank // 5)))
    for panel, off, title in zip(panels, found, ("packs as one", "a fifth removed"), strict=True):
        for (name, values), color in zip(off.items(), COLORS, strict=True):
            values = torch.tensor(values).clamp_min(1e-9).sort().values
            panel.semilogy(torch.linspace(0, 100, len(values)), values, color=color, label=name)
        panel.set(title=title, xlabel="edits in order, %")
        panel.legend(frameon=False)
    panels[0].set_ylabel("output off by, relative")
    figure.savefig(given.out, dpi=150)
