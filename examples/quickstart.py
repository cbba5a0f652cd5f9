"""Edit four facts, save them as a pack, and load the pack with PEFT alone.

    python examples/quickstart.py

Runs on the small model that comes with the package, in half a minute on a CPU. For your own model,
load it and its tokenizer with transformers, and pass a few million tokens of ordinary text.
"""

import tempfile

from peft import PeftModel

from alphaedit_peft import AlphaEditConfig, Edit, NullSpace, embedded, get_alphaedit_model


def says(model, tokenizer, prompt: str) -> str:
    """The model's answer to a prompt, up to the full stop."""
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :]).partition(".")[0].strip()


def main() -> None:
    base, tokenizer = embedded.load()
    config = AlphaEditConfig()  # settings that fit the model; see its fields

    # what the edits must not disturb: statistics of the model's keys over ordinary text
    null_space = NullSpace.from_texts(base, tokenizer, embedded.texts(2000), config, progress=False)

    edits = [
        Edit(
            subject=record["requested_rewrite"]["subject"],
            prompt=record["requested_rewrite"]["prompt"],  # "{}" is the place of the subject
            target_new=record["requested_rewrite"]["target_new"]["str"],
        )
        for record in embedded.records(28)[0::7]  # four people of the model's world
    ]
    before = [says(base, tokenizer, edit.question) for edit in edits]

    model = get_alphaedit_model(base, config, tokenizer=tokenizer, null_space=null_space)
    report = model.edit(edits, progress=False)
    for edit, old in zip(edits, before, strict=True):
        print(f"{edit.question}: {old} -> {says(model, tokenizer, edit.question)}")
    print(report)

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        edited = [says(model, tokenizer, edit.question) for edit in edits]
        plain = PeftModel.from_pretrained(model.unload(), folder)  # any LoRA loader will do
        assert [says(plain, tokenizer, edit.question) for edit in edits] == edited
    print("The pack says the same with PEFT alone.")


if __name__ == "__main__":
    main()
