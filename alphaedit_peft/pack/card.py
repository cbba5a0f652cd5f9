"""What a pack says about itself to people: a model card for the Hub, a summary for the terminal.

In: a pack. Out: Markdown with YAML metadata, or plain text. Edits are strangers' texts: whatever
Markdown or YAML would read into them is escaped.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PureWindowsPath
from statistics import median
from typing import Any, NamedTuple

from alphaedit_peft import embedded
from alphaedit_peft.hub import repository_name
from alphaedit_peft.messages import cut, one_line
from alphaedit_peft.pack.contents import PackContents
from alphaedit_peft.pack.edit_record import ROLES
from alphaedit_peft.pack.parents import parent_in_words, stands_on
from alphaedit_peft.tables import count

PLACE = "path/or/repository/of/this/pack"
PARENT = "path/or/repository/of/parent"
MAX_LISTED = 100  # edits in the card's table; edits.jsonl has all
MAX_CELL = 200  # characters

_PEFT = """\
from peft import PeftModel

model = PeftModel.from_pretrained(base, {first}{where})"""
_OWN = """\
from alphaedit_peft import AlphaEditModel, EditPack

print(EditPack.from_pretrained({place}{inside}).summary())
model = AlphaEditModel.from_pretrained(base, {first}{where})"""

_USE = """\
{lead}

```python
{code.peft}
```
{otherwise}
With `alphaedit_peft`, {purpose}:

```python
{code.own}
```
"""
_ALONE = "Then the adapter. With PEFT alone, as any LoRA:"
_TRANSFORMERS = "\nWith transformers alone: `base.load_adapter({place}{adapter_kwargs})`.\n"
_ABOVE = """\
This adapter was made on top of {parents}, and acts as it was made only beside {them}. Load {them}
first. With PEFT alone:"""
_LOADING = """\
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base})"""
_LOADING_EMBEDDED = """\
from alphaedit_peft import embedded

base, tokenizer = embedded.load()"""
_ABOUT_EMBEDDED = """
The base is the small model within the Python package `alphaedit_peft`. It is on no Hub, so that
`AutoPeftModelForCausalLM` cannot find it by its name; load it first, as here.
"""
_INTRODUCTION = """\
# Edited facts, as a LoRA

This adapter changes what its base model says about {facts}, and as little else as possible. It was
made by [AlphaEdit](https://arxiv.org/abs/2410.02355): updates of {modules}, confined to
directions that preserved knowledge does not use. {rows}; rank {rank}, scaling 1.

## Use

Load the base:

```python
{loading}
```
{about}
{use}
To deploy a plain model with the edits in its weights, rounded once to the base's dtype:

```python
model.merge_and_unload().save_pretrained("edited-model")
```

## Edits

"""
_NO_TEXTS = """\
The texts of the edits are left out of this card; [alphaedit/edits.jsonl](alphaedit/edits.jsonl)
has them.
"""
_RESPONSIBILITY = """\
## Responsible use

An edit changes what the model says, whether or not it is true, and it may also change other things
the model says about the same subject. Check the list of edits before you rely on this adapter,
measure on your own prompts, tell users that the model was edited, and do not use edits to spread
false statements about people or events.
"""


def card(
    pack: PackContents, repo: str | None = None, subfolder: str | None = None, *, texts: bool = True
) -> str:
    """The model card, ``README.md``: metadata, how to load, a table of the edits, provenance.

    Its code names the repository and subfolder, or a placeholder where there is none. Without
    ``texts`` it says where those of the edits are.
    """
    from huggingface_hub import ModelCardData

    base = pack.config.base_model_name_or_path
    on_hub = repository_name(base)
    data = ModelCardData(
        base_model=on_hub,
        base_model_relation="adapter" if on_hub else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["alphaedit", "knowledge-editing", "lora"],
    )
    introduction = _INTRODUCTION.format(
        facts=count(len(pack.edits), "fact"),
        modules=count(len(pack.modules), "matrix", "matrices"),
        rank=pack.rank,
        loading=loading_code(base),
        about=_ABOUT_EMBEDDED if base == embedded.NAME else "",
        rows=_rows(pack),
        use=_use(pack, repo or PLACE, subfolder),
    )
    parts = [introduction, _measured(pack), _edit_table(pack) if texts else _NO_TEXTS]
    facts = "".join(f"- {name}: {_escaped(value)}\n" for name, value in _provenance(pack))
    parts += [f"\n{_RESPONSIBILITY}\n## Provenance\n\n", facts]
    return f"---\n{data.to_yaml()}\n---\n\n{''.join(parts)}"


def summary(pack: PackContents) -> str:
    """A plain-text table of the pack: counts, norms |Delta| by module, size, base, null space."""
    roles: Counter[str] = Counter(record.role for record in pack.records)
    others = "".join(f", {roles[role]} {role}" for role in ROLES[1:] if roles[role])
    batches = count(len(pack.batches), "batch", "batches")
    force = "" if pack.mixed else f", {len(pack.active_rows())} in force"
    facts = [
        ("edits", f"{roles['own']} own{others}, in {batches}"),
        ("rank", f"{pack.rank}{force}"),
        ("layers", ", ".join(map(str, pack.layers))),
        ("dtype", str(pack.dtype).removeprefix("torch.")),
        ("size", f"{pack.size_bytes / 1e6:.3f} MB"),
        *([] if pack.compression is None else [("compression", str(pack.compression))]),
        *((name, _one_line(value)) for name, value in _provenance(pack)),
        *(("parent", _one_line(parent_in_words(parent))) for parent in pack.parents),
        *((f"|Delta| {name}", f"{delta.norm():.4g}") for name, delta in pack.factors.items()),
    ]
    width = max(len(name) for name, _ in facts)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts)


def base_name(pack: PackContents) -> str:
    """What strangers may be told of the base: its name on the Hub, never a path."""
    name = pack.config.base_model_name_or_path
    return embedded.NAME if name == embedded.NAME else repository_name(name) or "a local model"


def loading_code(base: str | None) -> str:
    """The lines of Python that load a base of this name or path."""
    if base == embedded.NAME:
        return _LOADING_EMBEDDED
    return _LOADING.format(base=json.dumps(repository_name(base) or "path/of/the/base/model"))


class Code(NamedTuple):
    """Python that loads a pack onto ``base``: with PEFT alone, and with this package."""

    peft: str
    own: str


def loading(place: str, inside: str, parents: Sequence[Mapping[str, Any]]) -> Code:
    """The code that loads a pack from a path or repository, after the packs that it stands on.

    ``inside`` is ``subfolder="..."`` or empty; where the parents lie is left to fill in.
    """
    inside = inside and f", {inside}"
    words = {"place": json.dumps(place), "inside": inside}
    if not parents:
        words |= {"first": json.dumps(place), "where": inside}
        return Code(_PEFT.format(**words), _OWN.format(**words))
    words |= {"first": json.dumps(f"{PARENT}1"), "where": ', adapter_name="parent1"'}
    names = [f"parent{i + 1}" for i in range(len(parents))]
    lines = [""]
    for i, name in enumerate(names[1:], start=1):
        lines += [f'model.load_adapter("{PARENT}{i + 1}", "{name}")', _activate(names[: i + 1])]
    lines += [f'model.load_adapter({json.dumps(place)}, "edits"{inside})']
    rest = "\n".join([*lines, _activate([*names, "edits"])])
    with_peft = rest.replace("model.set_adapter", "model.base_model.set_adapter")
    return Code(_PEFT.format(**words) + with_peft, _OWN.format(**words) + rest)


def _activate(names: Sequence[str]) -> str:
    return f"model.set_adapter({json.dumps(list(names))})"


def _use(pack: PackContents, place: str, subfolder: str | None) -> str:
    below = stands_on(pack.parents)
    inside = "" if subfolder is None else f"subfolder={json.dumps(subfolder)}"
    purpose = "to look at the edits" + ("" if pack.mixed else ", and to go on from them")
    if below:
        named = " and ".join(_escaped(_name(parent)) for parent in below)
        lead = _ABOVE.format(parents=named, them="it" if len(below) == 1 else "them")
        otherwise = ""
    else:
        kwargs = inside and f", adapter_kwargs=dict({inside})"
        lead = _ALONE
        otherwise = _TRANSFORMERS.format(place=json.dumps(place), adapter_kwargs=kwargs)
    code = loading(place, inside, below)
    return _USE.format(lead=lead, code=code, otherwise=otherwise, purpose=purpose)


def _name(parent: Mapping[str, Any]) -> str:
    """A parent's name, without the folders it lay in, its number of edits and digest."""
    name = PureWindowsPath(str(parent.get("name") or "another pack")).name
    return f"{name} ({parent.get('edits')} edits, digest {str(parent.get('digest'))[:12]})"


def _rows(pack: PackContents) -> str:
    """What the rows of A are, in a sentence without its full stop."""
    if not pack.mixed:
        return "Each edit is one row of `lora_A`, unless edits\nshare a subject"
    return (
        f"It was compressed ({pack.compression}), so\nthat rows of `lora_A` are mixtures, and "
        "edits can no longer be taken out or gone on from"
    )


def _provenance(pack: PackContents) -> list[tuple[str, str]]:
    base = [("base", base_name(pack))]
    if pack.base is not None:
        digest = pack.base.digest or "not verifiable"
        base.append(("base fingerprint", f"{digest} ({_flat(pack.base.shape)})"))
    return [
        *base,
        ("null space", _flat(pack.null_space) if pack.null_space else "not recorded"),
        ("contexts", str(len(pack.contexts))),
        ("versions", _flat(pack.versions)),
    ]


def _measured(pack: PackContents) -> str:
    """The probabilities of the new targets before and after, in one sentence."""
    own = [record for record in pack.records if record.role == "own"]
    before = [r.probability_before for r in own if r.probability_before is not None]
    after = [r.probability_after for r in own if r.probability_after is not None]
    if not before or not after:
        return ""
    return (
        f"Median probability of the new target: {median(before):.3g} before, {median(after):.3g} "
        f"right after ({len(after)} of {count(len(own), 'edit')} measured).\n\n"
    )


def _edit_table(pack: PackContents) -> str:
    own = [record for record in pack.records if record.role == "own"]
    if not own:
        return "None yet.\n"
    lines = ["| subject | prompt | new target | P before | P after |", "|---|---|---|---|---|"]
    for record in own[:MAX_LISTED]:
        texts = (record.edit.subject, record.edit.prompt, record.edit.target_new)
        measured = (record.probability_before, record.probability_after)
        cells = [*map(_escaped, texts), *("" if p is None else f"{p:.4g}" for p in measured)]
        lines.append(f"| {' | '.join(cells)} |")
    if len(own) > MAX_LISTED:
        more = len(own) - MAX_LISTED
        lines += ["", f"... and {more} more, in [alphaedit/edits.jsonl](alphaedit/edits.jsonl)."]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """One line of text that Markdown shows as it is, also within a table."""
    return re.sub(r"([\\`*_{}\[\]()<>#|~$&!])", r"\\\1", _one_line(text))


def _one_line(text: str) -> str:
    return cut(one_line(text), MAX_CELL)


def _flat(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(values.items()))
