"""Run CounterFact or zsRE records on a model of your own, batch after batch, as the papers do.

    python examples/counterfact_benchmark.py MODEL counterfact.json --texts corpus.txt --edits 2000

MODEL is a folder or a Hub id, corpus.txt ordinary text with one document a line: ten tokens for
each of the MLP's inner dimensions at least. A run that was stopped goes on in its folder.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from alphaedit_peft import AlphaEditConfig
from alphaedit_peft.evaluation import Suite, facts_of, read_cases
from alphaedit_peft.studies import Base, Schedule, Study, compare, file_digest, find_methods


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data", type=Path, help="CounterFact, zsRE or KnowEdit records as JSON")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--max-tokens", type=int, default=100_000)
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--every", type=int, default=5, help="judge after so many batches")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=["alphaedit", "memit"])
    parser.add_argument("--preset", choices=["auto", "paper"], default="auto")
    parser.add_argument("--moment-weight", type=float, help="MEMIT's, if not by its keys")
    parser.add_argument("--generate", action="store_true", help="fluency and consistency; slow")
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    return parser.parse_args()


def main() -> None:
    given = parsed()
    model = AutoModelForCausalLM.from_pretrained(given.model, device_map="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    own = {"preset": given.preset, "moment_weight": given.moment_weight}
    config = AlphaEditConfig(**own, on_conflict="replace")
    texts = [line for line in given.texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    base = Base.from_texts(model, tokenizer, texts, config, max_tokens=given.max_tokens)
    cases, report = read_cases(given.data, limit=given.edits + 200)
    print(report)
    suite = Suite(cases[: given.edits], facts_of(cases[given.edits :]), texts[-50:])
    data = {"name": given.data.name, "sha256": file_digest(given.data)}
    study = Study(base, suite, config, generate=given.generate, data=data)
    schedule = Schedule(given.batch_size, given.every)
    methods = find_methods(given.methods)
    print(compare(study, methods, given.folder, schedule, seeds=given.seeds, progress=print))


if __name__ == "__main__":
    main()
