"""Put what measure_settings.py measured into a page, as a table between the page's two marks.

python docs/figures/tabulate_settings.py settings.json more.json --page docs/tuning.md
"""

import argparse
import json
from pathlib import Path

BEGIN, END = "<!-- settings -->\n", "<!-- /settings -->"
SHARES = {
    "efficacy": "efficacy",
    "generalization": "generalization",
    "specificity": "specificity",
    "unedited_recall": "unedited",
    "same_subject_recall": "same subject",
}
OTHERS = {"perplexity": "perplexity", "not_taken": "not taken", "seconds": "seconds"}


def table(rows: list[dict]) -> str:
    """A line for each model and setting; shares in percent, empty where nothing was measured."""
    head = ["model", "setting", *SHARES.values(), *OTHERS.values()]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        shares = [f"{100 * row[name]:.1f}" if name in row else "" for name in SHARES]
        others = [f"{row[name]:.4g}" if name in row else "" for name in OTHERS]
        lines.append([row["model"], row["setting"], *shares, *others])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measured", type=Path, nargs="+")
    parser.add_argument("--page", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="write all rows into this file too")
    given = parser.parse_args()
    rows = [row for path in given.measured for row in json.loads(path.read_text())]
    if given.data:
        given.data.write_text(json.dumps(rows, indent=1) + "\n")
    before, rest = given.page.read_text().split(BEGIN)
    given.page.write_text(f"{before}{BEGIN}{table(rows)}{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
