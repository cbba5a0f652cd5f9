"""Compare six editors on the embedded model: the same facts, edited batch after batch.

    python examples/compare_editors.py --edits 40 --seeds 0 --folder runs

Each method has the settings that are best for it on --search other facts; fine-tuning's were chosen
by hand on such. Each method and order of the edits is a run in FOLDER; a script that was stopped
goes on there. Its findings are written to FOLDER/results.json, which docs/figures/plot_results.py
draws.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from alphaedit_peft import embedded
from alphaedit_peft.evaluation import embedded_suite
from alphaedit_peft.studies import METHODS, Base, Schedule, Study, choose, compare, find_methods

SETTINGS = {"finetuning": {"learning_rate": 1e-2, "bound": 2e-2}}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=120)
    parser.add_argument("--search", type=int, default=60, help="other edits, to choose by; 0: none")
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
    suite = embedded_suite(given.edits + given.search, unedited=100, texts=50)
    # four neighbours a case instead of ten: a third of the time
    cases = [replace(case, neighborhood=case.neighborhood[:4]) for case in suite.cases]
    judged = replace(suite, cases=cases[: given.edits])
    study = Study(base, judged, data={"name": "embedded", "seed": 0})
    methods = [m.with_settings(**SETTINGS.get(m.name, {})) for m in find_methods(given.methods)]
    searched = {}
    if given.search:
        probes = replace(suite, cases=cases[given.edits :], unedited=())
        methods, searched = choose(study, methods, probes, given.folder, progress=print)
    schedule = Schedule(given.batch_size, given.every)
    found = compare(study, methods, given.folder, schedule, seeds=given.seeds, progress=print)
    print(f"\n{found}")
    path = given.folder / "results.json"
    facts = {"search": searched, **found.to_json()}
    path.write_text(json.dumps(facts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
