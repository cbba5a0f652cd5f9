"""Put a pack on the Hub, and load it from there with and without this package.

    python examples/share_a_pack.py user/pack [user/null-spaces]

Needs `hf auth login`, or HF_TOKEN in the environment; HF_ENDPOINT names another Hub than the usual.
The repositories are made private.
"""

import sys

import torch
from peft import PeftModel

from alphaedit_peft import (
    AlphaEditConfig,
    AlphaEditModel,
    Edit,
    NullSpace,
    embedded,
    get_alphaedit_model,
)


def main(repo: str, spaces: str | None = None) -> None:
    wanted = embedded.records(1)[0]["requested_rewrite"]
    edit = Edit(wanted["subject"], wanted["prompt"], wanted["target_new"]["str"])
    base, tokenizer = embedded.load()
    config = AlphaEditConfig(num_contexts=2)
    space = NullSpace.from_texts(base, tokenizer, embedded.texts(1500), config, progress=False)
    if spaces is not None:  # beside those of other models; the config finds it by fingerprint
        print("null space:", space.push_to_hub(spaces, by_fingerprint=True, private=True))
        config = AlphaEditConfig(num_contexts=2, null_space=spaces)
        space = None

    model = get_alphaedit_model(base, config, tokenizer=tokenizer, null_space=space)
    model.edit([edit], progress=False)
    print("pack:", model.push_to_hub(repo, private=True))

    ids = tokenizer(edit.question, return_tensors="pt").input_ids
    ours = AlphaEditModel.from_pretrained(embedded.load()[0], repo)
    plain = PeftModel.from_pretrained(embedded.load()[0], repo)
    with torch.no_grad():
        answers = [loaded(ids).logits[0, -1] for loaded in (model, ours, plain)]
    assert torch.equal(answers[0], answers[1])
    assert torch.allclose(answers[0], answers[2], atol=1e-4)
    said = tokenizer.decode(answers[2].argmax())
    print(f"{edit.question}{said}: the same from the Hub, with and without this package.")


if __name__ == "__main__":
    main(*sys.argv[1:3])
