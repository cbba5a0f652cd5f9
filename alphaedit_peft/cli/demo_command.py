"""``alphaedit demo``: what the package does, shown on the model that comes with it.

In: nothing, or a folder to keep what is written. Out: tables of what was measured, and exit code 1
if the base was not restored, or the pack answered differently elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from alphaedit_peft.cli import arguments, printing
from alphaedit_peft.saving import temporary_folder

if TYPE_CHECKING:
    from rich.table import Table

    from alphaedit_peft.cli.demo_run import Findings


ROWS = {
    "edit": "edited prompts say the new target",
    "paraphrase": "paraphrases say the new target",
    "same subject": "other facts of these people hold",
    "bystander": "the same fact of other people holds",
}


def demo(
    *,
    out: Annotated[
        Path | None, Option(metavar="DIR", help="Keep the pack, null space and edits here.")
    ] = None,
    as_json: arguments.JsonOption = False,
) -> None:
    """Edit ten facts of the embedded model, and take the pack through its whole life.

    Questions are asked before and after; the pack is written, unloaded, loaded by PEFT alone and
    merged. Needs no download, and less than a minute.

    `alphaedit demo --out demo`, then `alphaedit inspect demo/pack`
    """
    if out is not None:
        arguments.check_folder(out)
    arguments.hush()
    from alphaedit_peft.cli.demo_run import demonstrate

    def tell(step: str) -> None:
        printing.show(False, None, f"- {step} ...")

    with temporary_folder() as temporary:
        folder = out or temporary
        folder.mkdir(parents=True, exist_ok=True)
        found = demonstrate(folder, (lambda step: None) if as_json else tell)
    facts = {"out": None if out is None else str(out), **found.to_json()}
    printing.show(as_json, facts, "", _facts(found), _summary(found), _elsewhere(found))
    if not as_json:
        kept = "" if out is None else f" Kept in {out}: edits.jsonl, null_space, pack."
        printing.show(False, None, f"{found.seconds:.0f} seconds.{kept}")
    if not (found.restored and found.same("plain PEFT") and found.same("merged")):
        raise RuntimeError("the pack did not behave the same everywhere, see the last table")


def _facts(found: Findings) -> Table:
    """One row an edit: what the model says before and after."""
    rows = []
    asked = zip(found.questions, found.answers["base"], found.answers["edited"], strict=True)
    for question, before, after in asked:
        if question.kind == "edit":
            change = f"{before.probability_new:.3f} -> {after.probability_new:.3f}"
            rows.append((question.prompt, before.text, question.new, after.text, change))
    columns = ["prompt", "before", "new target", "after", ">P(new target)"]
    return printing.table("What the model says", columns, rows)


def _summary(found: Findings) -> Table:
    """Counts for each kind of question, before and after."""
    rows = []
    for kind, meaning in ROWS.items():
        counts = (found.right(kind, state) for state in ("base", "edited"))
        rows.append((meaning, *(f"{right} of {total}" for right, total in counts)))
    return printing.table("How far it reaches", ["", ">before", ">after"], rows)


def _elsewhere(found: Findings) -> Table:
    """The pack's life: size, and whether it behaves the same in other hands."""
    size = f"rank {found.pack.rank}, {found.pack.size_bytes / 1000:.0f} kB"
    bits = "every weight of the base has its original bits" if found.restored else "WEIGHTS DIFFER"
    rows = [("pack written", size), ("adapter unloaded", bits)]
    for state, how in (("plain PEFT", "pack loaded by PEFT alone"), ("merged", "merged")):
        equal, furthest = found.agreement(state)
        within = f"P within {furthest:.0e}" if furthest else "P equal"
        rows.append((how, f"{equal} of {len(found.questions)} answers the same, {within}"))
    return printing.table("The same edits elsewhere", ["", ""], rows)
