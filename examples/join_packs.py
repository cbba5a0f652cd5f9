"""Join two packs from their files, and compare with adding them as PEFT does.

Run it as python examples/join_packs.py [--edits 20] [--picture join.png].
"""

import argparse

from peft import PeftModel

import alphaedit_peft as ae
from alphaedit_peft import EditPack, NullSpace, embedded
from alphaedit_peft.embedded.measure import recalled


def make_pack(edits: list[ae.Edit], config: ae.AlphaEditConfig, null_space: NullSpace, folder: str):
    base, tok = embedded.load()
    model = ae.get_alphaedit_model(base, config, tokenizer=tok, null_space=null_space)
    model.edit(edits, progress=False)
    model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--edits", type=int, default=20, help="in each pack")
    parser.add_argument("--picture")
    parser.add_argument("--folder", default="packs")
    given = parser.parse_args()
    facts = [record["requested_rewrite"] for record in embedded.records()[::5]]
    edits = [ae.Edit(f["subject"], f["prompt"], f["target_new"]["str"]) for f in facts]
    halves = [edits[: given.edits], edits[given.edits : 2 * given.edits]]
    base, tok = embedded.load()
    config = ae.AlphaEditConfig(num_contexts=2, threshold=0.002, threshold_mode="energy")
    null_space = NullSpace.from_texts(base, tok, embedded.texts(1500), config, progress=False)
    folders = [f"{given.folder}/{name}" for name in ("first", "second", "joined")]
    for i in (0, 1):
        make_pack(halves[i], config, null_space, folders[i])
    EditPack.join([EditPack.from_pretrained(f) for f in folders[:2]]).save_pretrained(folders[2])
    model = PeftModel.from_pretrained(base, folders[0], adapter_name="first")
    model.load_adapter(folders[1], "second")
    model.load_adapter(folders[2], "joined")
    model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "added", combination_type="cat")
    found = {}
    for state in ("first", "second", "added", "joined"):
        model.set_adapter(state)
        asked = [[(e.question, e.target_new) for e in half] for half in halves]
        found[state] = [100 * sum(r) / len(r) for r in (recalled(model, tok, a) for a in asked)]
        print("{:6}  first's edits {:3.0f} %, second's {:3.0f} %".format(state, *found[state]))
    if given.picture:
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(layout="constrained", figsize=(6, 3))
        for i, label in enumerate(("first pack's edits", "second pack's edits")):
            heights = [both[i] for both in found.values()]
            axes.bar([*found], heights, 0.4 - 0.8 * i, align="edge", label=label)
        axes.legend(title="say their target, %", loc="lower left")
        figure.savefig(given.picture)


if __name__ == "__main__":
    main()
