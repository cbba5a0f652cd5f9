"""Join two packs, from their files and in a model, and compare with adding them as PEFT does.

    python examples/join_packs.py [--edits 20] [--folder packs]

A line says what share of each pack's edits is said greedily, and their mean P(target).
"""

import argparse

from peft import PeftModel

import alphaedit_peft as ae
from alphaedit_peft import EditPack, NullSpace, embedded
from alphaedit_peft.evaluation import Case, embedded_suite, evaluate


def tell(state: str, model: PeftModel, tok, halves: list[list[ae.Edit]]) -> None:
    print(f"{state:6}", end="")
    for which, half in zip(("first", "second"), halves, strict=True):
        scores = evaluate(model, tok, [Case(edit) for edit in half])
        said, likely = 100 * scores["efficacy_recall"], scores["efficacy_probability"]
        print(f"  {which} pack's edits {said:3.0f} % P {likely:.3f}", end="")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--edits", type=int, default=20, help="in each pack")
    parser.add_argument("--folder", default="packs")
    given = parser.parse_args()
    edits = embedded_suite(2 * given.edits).edits
    halves = [edits[: given.edits], edits[given.edits :]]
    base, tok = embedded.load()
    # packs can be joined where they have one threshold, so it is set and not left to each
    config = ae.AlphaEditConfig(num_contexts=2, threshold=0.02, threshold_mode="energy")
    null_space = NullSpace.from_texts(base, tok, embedded.texts(1500), config, progress=False)
    folders = [f"{given.folder}/{name}" for name in ("first", "second", "joined")]
    for half, folder in zip(halves, folders, strict=False):
        model = ae.get_alphaedit_model(base, config, tokenizer=tok, null_space=null_space)
        model.edit(half, progress=False)
        model.save_pretrained(folder)
        base = model.unload()
    EditPack.join(folders[:2]).save_pretrained(folders[2])
    model = PeftModel.from_pretrained(base, folders[0], adapter_name="first")
    model.load_adapter(folders[1], "second")
    model.load_adapter(folders[2], "joined")
    model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "added", combination_type="cat")
    for state in ("first", "second", "added", "joined"):
        model.set_adapter(state)
        tell(state, model, tok, halves)
    base = model.unload()
    model = ae.get_alphaedit_model(base, config, tokenizer=tok, null_space=null_space)
    model.join(folders[:2])
    tell("poured", model, tok, halves)


if __name__ == "__main__":
    main()
