"""Draw what docs/tuning.md looks at: spectrum, other tokens, residual shares and key cosines.

python docs/figures/plot_tuning.py --out docs/images/tuning.png [--edits 50]
"""

import argparse

import torch
from matplotlib import pyplot as plt

import alphaedit_peft as ae
from alphaedit_peft import embedded, hooks
from alphaedit_peft.editing.prompts import Renderer
from alphaedit_peft.evaluation import embedded_suite
from alphaedit_peft.nullspace.threshold import ENERGIES, least_disturbing


def cosines(rows: torch.Tensor) -> list[float]:
    """|cosine| of every pair of different rows (n, d)."""
    unit = torch.nn.functional.normalize(rows, dim=1)
    return (unit @ unit.T).abs()[torch.triu(torch.ones(len(rows), len(rows)), 1) > 0].tolist()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="tuning.png")
    parser.add_argument("--edits", type=int, default=50)
    given = parser.parse_args()
    base, tok = embedded.load()
    config = ae.AlphaEditConfig()
    space = ae.NullSpace.from_texts(base, tok, embedded.texts(3000), config, progress=False)
    edits = embedded_suite(given.edits).edits
    names = {n: f"model.layers.{n}.mlp.down_proj" for n in space.layers}
    around = {n: [] for n in names}  # by layer, for each edit: its key, and its prompt's others
    for edit in edits:
        row = Renderer(tok, config).edit_rows(edit, ()).rows[0]
        ids, block = {"input_ids": torch.tensor([row.ids])}, f"model.layers.{max(names)}"
        keys = hooks.capture_inputs(base, ids, [*names.values()], block)
        for n, name in names.items():
            others = [i for i in range(1, len(row.ids)) if i != row.subject_last]
            around[n].append((keys[name][0, row.subject_last], keys[name][0, others]))
    model = ae.get_alphaedit_model(base, config, tokenizer=tok, null_space=space)
    report = model.edit(edits, progress=False)
    figure, axes = plt.subplots(2, 2, layout="constrained", figsize=(9, 6))
    (spectrum, others), (shares, cosine) = axes
    for color, n in zip(("C0", "C1", "C2"), names, strict=False):
        spectrum.semilogy(space.spectra[n].flip(0).clamp_min(1e-9), color=color, label=f"layer {n}")
        spectrum.axvline(space.width(n) - space.null_dimension(n), color=color, linestyle="--")
        others.semilogx(
            ENERGIES,
            [*least_disturbing(space.parts, space.threshold, {n: around[n]})[1].values()],
            "o-",
        )
        shares.hist([r.shares[n] for r in report], 20, range=(0, 1.1), alpha=0.6)
        raw = torch.stack([key for key, _ in around[n]])
        for rows, style in ((raw, ":"), (space.project(n, raw), "-")):
            cosine.ecdf(cosines(rows), color=color, linestyle=style)
    spectrum.set(title="Spectrum of C0; what is right of the dashes is kept", xlabel="direction")
    others.set(title="How far an edit moves its prompt's other tokens", xlabel="threshold (energy)")
    shares.set(title="Share of the wanted residual reached", xlabel="share", ylabel="edits")
    cosine.set(title="|cosine| of keys: raw (dotted), projected", xlabel="|cosine|", ylabel="pairs")
    spectrum.legend()
    figure.savefig(given.out, dpi=120)


if __name__ == "__main__":
    main()
