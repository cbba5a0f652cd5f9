"""Stop after a batch, go on later from the pack: the same bits as a run that never stopped.

    python examples/continue_editing.py

A float32 pack is the whole state of a sequence of edits; only the null space is needed beside it.
"""

import tempfile
from pathlib import Path

import torch

from alphaedit_peft import (
    AlphaEditConfig,
    AlphaEditModel,
    Edit,
    NullSpace,
    embedded,
    get_alphaedit_model,
)


def two_batches() -> tuple[list[Edit], list[Edit]]:
    """Four edits about different people, in two batches."""
    wanted = [record["requested_rewrite"] for record in embedded.records(28)[0::7]]
    edits = [Edit(w["subject"], w["prompt"], w["target_new"]["str"]) for w in wanted]
    return edits[:2], edits[2:]


def main() -> None:
    first, second = two_batches()
    base, tokenizer = embedded.load()
    config = AlphaEditConfig(num_contexts=2)
    with tempfile.TemporaryDirectory() as folder:
        pack, space = Path(folder, "pack"), Path(folder, "null_space")
        found = NullSpace.from_texts(base, tokenizer, embedded.texts(1500), config, progress=False)
        found.save_pretrained(space)  # once for a model
        given = {"tokenizer": tokenizer, "null_space": NullSpace.from_pretrained(space)}

        uninterrupted = get_alphaedit_model(base, config, **given)
        uninterrupted.edit(first, progress=False)
        uninterrupted.edit(second, progress=False)

        model = get_alphaedit_model(embedded.load()[0], config, **given)
        model.edit(first, progress=False)
        model.save_pretrained(pack)

        given["null_space"] = NullSpace.from_pretrained(space)
        model = AlphaEditModel.from_pretrained(embedded.load()[0], pack, **given)
        model.edit(second, progress=False)

    for layer, delta in uninterrupted.factors.items():
        assert torch.equal(delta.A, model.factors[layer].A)
        assert torch.equal(delta.B, model.factors[layer].B)
    print(f"{len(model.edits)} edits, stopped and continued: equal to the uninterrupted run.")


if __name__ == "__main__":
    main()
