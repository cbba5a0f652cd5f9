"""Draw the package's rooms, layer on layer, with their files and the imports between them.

    python docs/figures/draw_architecture.py docs/images/architecture.png

Layers are those of the contract in pyproject.toml; files and imports are read from the code by
``ast``, those for types alone and within functions included. An arrow is as wide as the number of
pairs of files that it stands for; one that points up would be red.
"""

import ast
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import tomllib
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "alphaedit_peft"
INK, QUIET, PAPER, WRONG = "#222222", "#4b5563", "#eef2f7", "#ff0000"
COLOURS = (
    *("#1d4ed8", "#0f766e", "#c2410c", "#7c3aed", "#15803d", "#be185d"),
    *("#b45309", "#0369a1", "#4d7c0f", "#6d28d9", "#9f1239", "#374151"),
)
WIDE, LINE, GAP, CHARACTERS = 9.0, 0.2, 0.22, 92  # inches of a box, a line, a gap; a line's length


def layers() -> list[list[str]]:
    """The names in each layer, the top one first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    found = next(c["layers"] for c in contracts["contracts"] if c["type"] == "layers")
    return [layer.replace("|", ":").replace(" ", "").split(":") for layer in found]


def name_of(file: Path) -> str:
    """editing/keys.py as alphaedit_peft.editing.keys."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file: Path, known: set[str]) -> Iterator[str]:
    """The package's modules that a file imports, at its top or anywhere in it."""
    whole = name_of(file).split(".")
    here = whole if file.name == "__init__.py" else whole[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield from {inner if inner in known else base} & known


def arrows(place: dict[str, int]) -> Counter[tuple[int, int]]:
    """How many pairs of files of two layers import one from the other, (importer, imported)."""
    files = {name_of(file): file for file in PACKAGE.rglob("*.py")}
    pairs = {(a, b) for a, file in files.items() for b in imported(file, set(files))}
    rooms = [[name.split(".")[1] for name in pair if "." in name] for pair in pairs]
    found = Counter((place[r[0]], place[r[1]]) for r in rooms if len(r) == 2)
    return Counter({pair: number for pair, number in found.items() if len({*pair}) == 2})


def told(names: list[str]) -> tuple[str, str, str]:
    """What stands in a layer's box: its folder, what that is for, and its files."""
    folder = PACKAGE / names[0]
    if len(names) > 1:
        every = [name + (".py" if (PACKAGE / f"{name}.py").is_file() else "/") for name in names]
        return "", "", "   ".join(every)
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    purpose = re.sub(r":\w+:|`", "", text.partition("\n")[0])
    if not folder.is_dir():
        return file.name, purpose, ""
    files = [p.relative_to(folder) for p in folder.rglob("*.py") if not p.name.startswith("__")]
    files.sort(key=lambda path: (len(path.parts), path))
    shown = "  ".join(path.with_suffix("").as_posix() for path in files)
    return f"{names[0]}/", purpose, shown


def draw(out: Path) -> None:
    """One box a layer, one below the other; to their right an arc for the imports of each pair."""
    rows = layers()
    place = {name: number for number, names in enumerate(rows) for name in names}
    texts = [(*texts, textwrap.wrap(files, CHARACTERS)) for *texts, files in map(told, rows)]
    heights = [LINE * (len(lines) + bool(title)) + 0.16 for title, _, lines in texts]
    total = sum(heights) + GAP * len(rows)
    figure, panel = plt.subplots(figsize=(13, total))
    edges, top = [], total
    for colour, (title, purpose, lines), height in zip(cycle(COLOURS), texts, heights):
        shape = {"boxstyle": "round,pad=0,rounding_size=.06", "facecolor": PAPER}
        box = FancyBboxPatch((0, top - height), WIDE, height, edgecolor=colour, lw=1.8, **shape)
        panel.add_patch(box)
        style, y = {"va": "top", "fontsize": 9}, top - 0.08
        if title:
            panel.text(0.12, y, title, weight="bold", family="monospace", color=INK, **style)
            panel.text(0.35 + 0.09 * len(title), y, purpose, color=INK, va="top", fontsize=8.5)
        weight = "normal" if title else "bold"
        for number, line in enumerate(lines, start=bool(title)):
            line_y = y - LINE * number
            panel.text(0.12, line_y, line, family="monospace", color=QUIET, weight=weight, **style)
        edges.append((top - height, height))
        top -= height + GAP
    found = arrows(place)
    for (a, b), count in sorted(found.items()):
        start, end = (_point(edges, found, end, (a, b)) for end in (0, 1))
        bend = -0.75 if a < b else 0.75
        arc = FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>")
        arc.set(color=COLOURS[a % len(COLOURS)] if a < b else WRONG, linewidth=0.6 + count**0.5 / 3)
        arc.set(mutation_scale=9, alpha=0.85)
        panel.add_patch(arc)
    panel.set(xlim=(-0.1, 13), ylim=(top, total + 0.1))
    panel.set_axis_off()
    figure.savefig(out, dpi=110, bbox_inches="tight")


def _point(edges: list, found: Counter, end: int, pair: tuple[int, int]) -> tuple[float, float]:
    """Where an arc leaves its layer's box (end 0) or comes in (1): each at a place of its own.

    From the top down come those that arrive, from near and from far, then those that leave.
    """
    here = pair[end]
    coming = sorted((p for p in found if p[1] == here), reverse=True)
    leaving = sorted((p for p in found if p[0] == here), reverse=True)
    order = [*((1, p) for p in reversed(coming)), *((0, p) for p in leaving)]
    bottom, height = edges[here]
    share = (order.index((end, pair)) + 0.5) / len(order)
    return WIDE + 0.02, bottom + height * (1 - share)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
