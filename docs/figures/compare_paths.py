"""The same edits the plain way, all together, and with autocast: what each model then says.

    python docs/figures/compare_paths.py [--models embedded] [--edits 50] [--out paths.json]
    python docs/figures/compare_paths.py --models FOLDER --records FILE.json --corpus FILE.txt

Models, records and corpus as in measure_settings.py. The ridge is absolute, since the plain way
knows no other; thresholds are the model's own.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

from measure_settings import load

import alphaedit_peft as ae
from alphaedit_peft.editing.contexts import sample_contexts
from alphaedit_peft.editing.prompts import Renderer
from alphaedit_peft.evaluation import evaluate
from alphaedit_peft.studies.benchmark.plain import PlainModel

SHOWN = "efficacy generalization specificity unedited_recall perplexity".split()
WAYS = ("plain", "together", "autocast")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["embedded"], metavar="FOLDER")
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--records", type=Path, help="CounterFact records, for other models")
    parser.add_argument("--num-records", type=int, default=300, help="read so many of them")
    parser.add_argument("--corpus", type=Path, help="text for key moments, with --records")
    parser.add_argument("--ridge", type=float, default=0.1)
    parser.add_argument("--out", type=Path)
    given, found = parser.parse_args(), []
    for folder in given.models:
        base, tok, suite, texts, _ = load(folder, given)
        config = ae.AlphaEditConfig(ridge=given.ridge, ridge_mode="absolute")
        space = ae.NullSpace.from_texts(base, tok, texts, config, max_tokens=40_000, progress=False)
        for way in WAYS:
            cast = dataclasses.replace(config, autocast="bfloat16" if way == "autocast" else None)
            start = time.perf_counter()
            model = ae.get_alphaedit_model(base, cast, tokenizer=tok, null_space=space)
            if way == "plain":
                renderer = Renderer(tok, model.alphaedit_config)
                contexts = sample_contexts(base, tok, model.alphaedit_config)
                full, architecture, base = (
                    model.alphaedit_config,
                    model.architecture,
                    model.unload(),
                )
                rows = [renderer.edit_rows(edit, contexts) for edit in suite.edits]
                plain = PlainModel.of(base, full, architecture, space)
                with plain.weights_kept():
                    plain.edit_batch(rows)
                    seconds, scores = time.perf_counter() - start, evaluate(base, tok, suite)
            else:
                model.edit(suite.edits, batch_size=len(suite.edits), progress=False)
                seconds, scores = time.perf_counter() - start, evaluate(model, tok, suite)
                base = model.unload()
            figures = {name: round(scores[name], 4) for name in SHOWN if name in scores.metrics}
            found.append({"model": Path(folder).name, "way": way, "seconds": round(seconds, 1)})
            found[-1] |= figures
            print(*found[-1].values(), sep="\t", flush=True)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
