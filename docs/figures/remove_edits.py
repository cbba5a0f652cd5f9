"""Take an eighth of a pack's rows out in three ways, and measure what that does to the others.

python docs/figures/remove_edits.py MODEL PACK NULL_SPACE
"""

import sys
from dataclasses import replace
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alphaedit_peft import AlphaEditModel, EditPack, NullSpace, embedded
from alphaedit_peft.evaluation import Case, evaluate


@torch.no_grad()
def hidden(model: torch.nn.Module, tok, edits: list, layer: int) -> torch.Tensor:
    """States at the subjects' last tokens after a block, (edits, d_model)."""
    found = []
    for edit in edits:
        read = tok(edit.question, return_tensors="pt", return_offsets_mapping=True)
        last = int((read["offset_mapping"][0, :, 0] < edit.subject_span[1]).sum()) - 1
        states = model(input_ids=read["input_ids"], output_hidden_states=True).hidden_states
        found.append(states[layer + 1][0, last])
    return torch.stack(found)


def main(name: str, folder: str, null_space: str) -> None:
    where = embedded.folder() if name == "embedded" else name
    base = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()
    tok, pack = AutoTokenizer.from_pretrained(where), EditPack.from_pretrained(folder)
    space, layer = NullSpace.from_pretrained(null_space), pack.layers[-1]
    out, own = torch.arange(0, pack.rank, 8), [r for r in pack.records if r.role == "own"]
    parts = [[r.edit for r in own if (r.row in out) is gone] for gone in (False, True)]
    ids = [edit.id for edit in parts[1]]  # parts: the edits that stay, and those that go
    cut = {name: replace(d, B=d.B.index_fill(1, out, 0.0)) for name, d in pack.factors.items()}
    packs = {"all edits": pack, "without": pack.without(ids, max_share=1.0)}
    packs |= {"columns dropped": replace(pack, factors=cut), "remove_edits": pack}
    bare, whole = [hidden(base, tok, part, layer) for part in parts], []
    print("| | stay: hidden change off by | P(target) | go: hidden change left | P(target) |")
    for state, some in packs.items():
        with TemporaryDirectory() as place:
            some.save_pretrained(place)
            model = AlphaEditModel.from_pretrained(base, place, tokenizer=tok, null_space=space)
        if state == "remove_edits":
            model.remove_edits(ids)
        now = [hidden(model, tok, part, layer) - b for part, b in zip(parts, bare, strict=True)]
        whole = whole or now  # what the pack adds after the last block edited
        off = ((now[0] - whole[0]).norm(dim=1) / whole[0].norm(dim=1)).mean()
        left = (now[1].norm(dim=1) / whole[1].norm(dim=1)).mean()
        P = [evaluate(model, tok, [*map(Case, part)])["efficacy_probability"] for part in parts]
        print(f"| {state} | {off:.1%} | {P[0]:.3f} | {left:.1%} | {P[1]:.3f} |", flush=True)
        base = model.unload()
    shares = ", ".join(f"{max(each.values()):.2f}" for each in pack.removal_shares(ids).values())
    print(f"{len(parts[0])} edits stay, {len(ids)} go; shares of these still in force: {shares}")


if __name__ == "__main__":
    main(*sys.argv[1:4])
