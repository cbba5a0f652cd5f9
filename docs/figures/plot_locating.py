"""Does tracing foretell where edits work? Trace the embedded model, edit each block, show both.

pip install matplotlib
python docs/figures/plot_locating.py docs/images/locate.png
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt

from alphaedit_peft import AlphaEditConfig, embedded
from alphaedit_peft.evaluation import embedded_suite
from alphaedit_peft.studies import Base
from alphaedit_peft.studies.locate import LAST_SUBJECT, locate
from alphaedit_peft.studies.tune import preset_grid, tune

MEASURES = ("efficacy", "generalization", "specificity", "same_subject_recall")


def draw(path: Path, facts: int, texts: int) -> None:
    """Left: what comes back at two tokens, by block. Right: edits that rewrite one block."""
    model, tokenizer = embedded.load()
    blocks = list(range(model.config.num_hidden_layers - 1))  # one stays above the edit
    suite = embedded_suite(facts, unedited=0, texts=50)
    found = locate(model, tokenizer, suite.edits, progress=print)
    config = AlphaEditConfig(rewrite_layers=blocks)
    base = Base.from_texts(model, tokenizer, embedded.texts(texts), config)
    grid = preset_grid(tuple((block,) for block in blocks))
    tried = tune(base, suite, grid, progress=print).tried
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for state, style in (("hidden", "--"), ("mlp", "-")):
        for name, colour in ((LAST_SUBJECT, "C0"), ("last", "C1")):
            values = found.effect(state, name)
            middle = [e.value for e in values]
            left.plot(middle, style, color=colour, marker="o", label=f"{state}, {name}")
            bounds = [[e.low for e in values], [e.high for e in values]]
            left.fill_between(range(found.blocks), *bounds, color=colour, alpha=0.12)
    left.set(xlabel="block restored", ylabel="P(target) that comes back", title="tracing")
    for name in MEASURES:
        values = [one.scores[name] for one in tried]
        right.plot(blocks, values, marker="o", label=name.replace("_", " "))
    right.set(xlabel="block rewritten", ylim=(-0.03, 1.03), title=f"{facts} edits")
    print("| block | hidden | MLP | " + " | ".join(MEASURES) + " | drift |")
    for block, one in zip(blocks, tried, strict=True):
        back = [found.effect(state, LAST_SUBJECT)[block].value for state in ("hidden", "mlp")]
        figures = [f"{v:.2f}" for v in (*back, *(one.scores[name] for name in MEASURES))]
        print(f"| {block} | {' | '.join(figures)} | {one.drift.value:.1e} |")
    for panel in (left, right):
        panel.legend(fontsize=8)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="picture to write")
    parser.add_argument("--facts", type=int, default=20)
    parser.add_argument("--texts", type=int, default=2500, help="for the null space")
    given = parser.parse_args()
    draw(given.out, given.facts, given.texts)
