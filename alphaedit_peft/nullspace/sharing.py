"""Null spaces on the Hub: which of a repository's is a base's own, and what its README says.

In: a repository or folder, and a base's fingerprint. Out: the local folder of the null space made
for that base; or, the other way, the address of the commit that put one there. A repository may
hold one null space at its root, and any number in folders named by their bases' fingerprints.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from alphaedit_peft import embedded
from alphaedit_peft.fingerprint import BaseFingerprint
from alphaedit_peft.hub import Destination, fetch_folder, push_folder, repository_name
from alphaedit_peft.messages import one_line
from alphaedit_peft.nullspace.spectrum import STEM, LayerSummary
from alphaedit_peft.safe_files import read_json
from alphaedit_peft.saving import left_aside, replace_file, temporary_folder

HEADER = f"{STEM}.json"
FILES = (HEADER, f"{STEM}.safetensors", "README.md")
MAX_HEADER_BYTES = 2**20  # of a null space among others; a larger one is passed over
MAX_NAME = 128  # hex digits of a folder's name: the embeddings and fifteen blocks

_CARD = """\
# Null space for editing {base}

Directions in which the keys of this model's MLPs may change without touching preserved knowledge,
for [AlphaEdit](https://arxiv.org/abs/2410.02355). It was measured over {tokens:,} tokens of
{corpus}, and fits this base alone: loading checks the fingerprint.

| layer | width | kept | threshold |
|---|---|---|---|
{rows}

## Use

```python
{use}
```

Base fingerprint: {fingerprint}.
"""
_USE = """\
from alphaedit_peft import AlphaEditConfig, get_alphaedit_model

config = AlphaEditConfig(null_space={repo})
model = get_alphaedit_model(base, config, tokenizer=tokenizer)"""
_USE_SUBFOLDER = """\
from alphaedit_peft import AlphaEditConfig, NullSpace, get_alphaedit_model

null_space = NullSpace.from_pretrained({repo}, subfolder={subfolder})
model = get_alphaedit_model(base, AlphaEditConfig(), tokenizer=tokenizer, null_space=null_space)"""


class About(NamedTuple):
    """What a README says of a null space: its layers, and where it comes from."""

    layers: Sequence[LayerSummary]
    tokens: int
    fingerprint: BaseFingerprint | None
    provenance: Mapping[str, Any]


def folder_name(fingerprint: BaseFingerprint) -> str:
    """The folder of a base's null space in a shared repository: its digest, cut to ``MAX_NAME``."""
    if fingerprint.digest is None:
        raise ValueError(
            "this null space was made on a quantised or offloaded base, so that there is no "
            "fingerprint to name its folder by; give subfolder= instead of by_fingerprint=True"
        )
    return fingerprint.digest[:MAX_NAME]


def find_folder(
    path_or_repo: str | Path,
    fingerprint: BaseFingerprint | None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
) -> Path:
    """The local folder of the null space that a base needs; of any base, the one at the root.

    Where a ``subfolder`` is given, no other is looked for. None for this base is a
    FileNotFoundError, and several are a ValueError: one must be named.
    """
    root = left_aside(path_or_repo) or Path(path_or_repo)
    if root.is_dir():
        return root / (subfolder or _choose(root, path_or_repo, fingerprint) or "")
    if isinstance(path_or_repo, Path) or root.exists():
        raise FileNotFoundError(f"{path_or_repo} is no folder, and no Hub repository's name")
    if subfolder is None:
        wanted = (HEADER, f"*/{HEADER}")
        headers = fetch_folder(path_or_repo, wanted, revision=revision, token=token)
        subfolder = _choose(headers, path_or_repo, fingerprint)
        revision = headers.name  # the commit of the headers, whatever was pushed since
    return fetch_folder(path_or_repo, FILES, revision=revision, token=token, subfolder=subfolder)


def push_null_space(
    save: Callable[[Path], object],
    about: About,
    to: Destination,
    *,
    by_fingerprint: bool,
    message: str | None,
) -> str:
    """Upload what ``save`` writes, with a README, and return the commit's address.

    ``by_fingerprint`` together with a subfolder, or without a fingerprint, is a ValueError.
    """
    if by_fingerprint:
        if to.subfolder is not None:
            raise ValueError(
                f"by_fingerprint=True names the folder itself; leave out subfolder={to.subfolder!r}"
            )
        if about.fingerprint is None:
            raise ValueError(
                "this null space is for any base (it has no fingerprint), so that no folder can be "
                "named by one; give subfolder= instead of by_fingerprint=True"
            )
        to = replace(to, subfolder=folder_name(about.fingerprint))
    with temporary_folder() as place:
        folder = place / "null_space"
        save(folder)
        text = card(about, to, by_fingerprint=by_fingerprint)
        replace_file(folder / "README.md", text)
        return push_folder(folder, to, FILES, message or f"Null space of {_base(about)}")


def card(about: About, to: Destination, *, by_fingerprint: bool) -> str:
    """The README of a null space on the Hub: what it is, of which base, and how to use it."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=repository_name(about.provenance.get("model")),
        library_name="alphaedit_peft",
        tags=["alphaedit", "knowledge-editing", "null-space"],
    )
    rows = [
        f"| {row.layer} | {row.width} | {row.kept} | {row.threshold:.4g} {row.threshold_mode} |"
        for row in about.layers
    ]
    digest = about.fingerprint and about.fingerprint.digest
    use = _USE if to.subfolder is None or by_fingerprint else _USE_SUBFOLDER
    text = _CARD.format(
        base=_base(about),
        tokens=about.tokens,
        corpus=_one_line(about.provenance.get("corpus", "an unknown corpus")),
        rows="\n".join(rows),
        use=use.format(repo=json.dumps(to.repo_id), subfolder=json.dumps(to.subfolder)),
        fingerprint=f"`{digest}`" if digest else "none, so that it fits by shape alone",
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def _choose(root: Path, given: str | Path, fingerprint: BaseFingerprint | None) -> str | None:
    """The name of the folder within ``root``, or None for the root itself."""
    named = {path.parent.name: _made_for(path) for path in sorted(root.glob(f"*/{HEADER}"))}
    if fingerprint is not None:
        known = {name: base for name, base in named.items() if base is not None}
        fitting = [n for n, base in known.items() if base.matches(fingerprint) is not False]
        best = [name for name in fitting if known[name] == fingerprint] or fitting
        if len(best) == 1:
            return best[0]
        if best:
            raise ValueError(
                f"{given} holds several null spaces that fit this model: {fitting}; load one with "
                "NullSpace.from_pretrained(..., subfolder=) and pass it as null_space="
            )
    if (root / HEADER).is_file():
        return None
    if not named:
        raise FileNotFoundError(f"{given} holds no {HEADER}; is it a null space?")
    short = [f"{name[:16]}..." if len(name) > 20 else name for name in named]
    if fingerprint is None:
        raise FileNotFoundError(
            f"{given} holds null spaces in folders, {short}, and none at its root; give "
            "subfolder=, or fingerprint= of the base"
        )
    raise FileNotFoundError(
        f"{given} holds null spaces of other bases, {short}, and none that fits this model "
        f"({(fingerprint.digest or 'not verifiable')[:16]}...); make one with "
        "NullSpace.from_texts, and share it with push_to_hub(by_fingerprint=True)"
    )


def _made_for(header: Path) -> BaseFingerprint | None:
    """The base of a null space, from its header; None where it names none that can be read.

    Headers in a shared repository come from strangers: none is read past ``MAX_HEADER_BYTES``.
    """
    try:
        values = read_json(header, limit=MAX_HEADER_BYTES)
        return BaseFingerprint.from_json(values["fingerprint"])
    except (OSError, ValueError, KeyError):
        return None


def _base(about: About) -> str:
    name = about.provenance.get("model")
    return str(name) if name == embedded.NAME else repository_name(name) or "a local model"


def _one_line(text: object) -> str:
    """Text from elsewhere, in one line and without Markdown's brackets."""
    return one_line(text).translate(str.maketrans("", "", "<>[]|`"))[:200]
