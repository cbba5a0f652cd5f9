"""Compare six editors on the embedded model: the same facts, edited batch after batch.

    python examples/compare_editors.py --edits 40 --seeds 0 --folder runs

Each method and order of the edits is a run in FOLDER; a script that was stopped goes on there. Its
findings are written to FOLDER/results.json, which docs/figures/plot_results.py draws. MEMIT's
weight and fine-tuning's rate and bound were chosen on other facts, see docs/results.md.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from alphaedit_peft import embedded
from alphaedit_peft.evaluation import embedded_suite
from alphaedit_peft.studies import METHODS, Base, Schedule, Study, compare, find_methods

SETTINGS = {
    "memit": {"moment_weight": 100.0},
    "memit-history": {"moment_weight": 100.0},
    "memit-projection": {"moment_weight": 100.0},
    "finetuning": {"learning_rate": 1e-2, "bound": 2e-2},
}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--every", type=int, default=2, help="judge after so many batches")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the orders")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    return parser.parse_args()


def main() -> None:
    given = parsed()
    model, tokenizer = embedded.load()
    base = Base.from_texts(model, tokenizer, embedded.texts(2500))
    suite = embedded_suite(given.edits, unedited=100, texts=50)
    # four neighbours a case instead of ten: a third of the time
    cases = [replace(case, neighborhood=case.neighborhood[:4]) for case in suite.cases]
    study = Study(base, replace(suite, cases=cases), data={"name": "embedded", "seed": 0})
    methods = [m.with_settings(**SETTINGS.get(m.name, {})) for m in find_methods(given.methods)]
    schedule = Schedule(given.batch_size, given.every)
    found = compare(study, methods, given.folder, schedule, seeds=given.seeds, progress=print)
    print(f"\n{found}")
    path = given.folder / "results.json"
    path.write_text(json.dumps(found.to_json()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
