"""``alphaedit inspect``, ``merge`` and ``rollback``: what can be done with a pack.

In: a pack, and a model where one is needed. Out: a summary, a page, a plain model, or a smaller
pack. They do what ``EditPack.summary``, ``report.pack_page``, ``AlphaEditModel.merge_and_unload``
and ``rollback`` do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import BadParameter, Option

from alphaedit_peft.cli import arguments, nullspace_commands, printing
from alphaedit_peft.saving import make_folder, replace_file

if TYPE_CHECKING:
    from rich.table import Table

    from alphaedit_peft.pack.contents import PackContents


LISTED = 20


def inspect_pack(
    pack: arguments.PackArgument,
    *,
    all_edits: Annotated[
        bool, Option("--all", help=f"List every edit, not the first {LISTED}.")
    ] = False,
    html: Annotated[
        Path | None, Option(metavar="PAGE.html", help="Write a page that shows it to people.")
    ] = None,
    null_space: Annotated[
        str | None, Option(metavar="DIR", help="For the page: the one the pack was made with.")
    ] = None,
    as_json: arguments.JsonOption = False,
) -> None:
    """Show what a pack holds, without any model. Reads NullSpace folders too.

    A parent "on top of" which it was edited has to be loaded beside it.

    `alphaedit inspect pack`

    `alphaedit inspect pack --html pack.html --null-space ns` (one file, for a browser)
    """
    if html is None and null_space is not None:
        raise BadParameter(f"--null-space {null_space} is for the page; give --html too")
    arguments.check_file("--html", html, arguments.PAGES)
    if (Path(pack) / "null_space.json").is_file():
        from alphaedit_peft import NullSpace

        if html is not None:
            raise ValueError(f"{pack} is a null space, and --html shows packs; leave it out")
        printing.show(as_json, *nullspace_commands.described(NullSpace.from_pretrained(pack)))
        return

    from alphaedit_peft.editing.capacity import pack_capacity
    from alphaedit_peft.pack.card import summary

    read = arguments.read_pack(pack)
    facts = _describe(read)
    if html is not None:
        from alphaedit_peft.report import pack_page

        name = Path(pack).resolve().name if Path(pack).is_dir() else pack
        space = arguments.load_null_space(null_space)
        replace_file(html, pack_page(read, space, title=f"Edit pack {name}"))
        edits = printing.count(len(read.edits), "edit")
        done = f"Written to {html}: {edits}; open it in a browser"
        printing.show(as_json, {"html": str(html), **facts}, done)
        return
    table = _edit_table(read, None if all_edits else LISTED)
    more = len(read.records) - len(table.rows)
    rest = [f"... and {more} more; --all lists them."] if more else []
    filled = pack_capacity(read)
    facts["capacity"] = None if filled is None else filled.to_json()
    room = [] if filled is None or not read.rank else [str(filled)]
    decided = [(d.get("name"), d.get("value"), d.get("reason")) for d in read.decisions]
    settings = printing.filled(*printing.DECIDED, decided)
    printing.show(as_json, facts, summary(read), *room, *settings, table, *rest)


def merge(
    model: arguments.ModelArgument,
    pack: arguments.PackArgument,
    *,
    out: arguments.OutOption,
    dtype: arguments.DtypeOption = "auto",
    device: arguments.DeviceOption = None,
    as_json: arguments.JsonOption = False,
) -> None:
    """Write a model with a pack's edits in its weights, and its tokenizer.

    What comes out is a plain model: no adapter, no trace of which edits were made. The sum is
    computed in float32 and rounded once to the model's dtype; what that changes is printed.

    `alphaedit merge MODEL pack --out edited-model`
    """
    from alphaedit_peft import AlphaEditModel
    from alphaedit_peft.progress import counting

    arguments.check_folder(out)
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"--out {out} is not empty; give a new folder")
    edits = len(arguments.read_alone(pack, "it cannot be merged alone").edits)
    base, tokenizer = arguments.load_model(model, dtype, device)
    edited = AlphaEditModel.from_pretrained(base, pack)
    with counting("merging", 3, "step", bar=False) as steps:
        rounding = max(edited.merge_errors().values())
        steps.update(1)
        merged: Any = edited.merge_and_unload(safe_merge=True)
        steps.update(1)

        def write(folder: Path) -> None:
            merged.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        make_folder(out, write)
    dtype_name = str(merged.dtype).removeprefix("torch.")
    facts = {"out": str(out), "edits": edits, "dtype": dtype_name, "rounding_error": rounding}
    printing.show(
        as_json,
        facts,
        f"Written to {out}: {printing.count(edits, 'edit')} merged, {dtype_name}",
        f"Rounding changed the update by at most {rounding:.2g} of its norm",
    )


def rollback(  # noqa: PLR0913
    model: arguments.ModelArgument,
    pack: arguments.PackArgument,
    *,
    out: arguments.OutOption,
    null_space: arguments.NullSpaceOption = None,
    batches: Annotated[int, Option(min=1, help="How many to take back.")] = 1,
    key_moments: arguments.MomentsOption = None,
    dtype: arguments.DtypeOption = "auto",
    device: arguments.DeviceOption = None,
    as_json: arguments.JsonOption = False,
) -> None:
    """Take back a pack's last batches of edits, and write what remains as a pack.

    What remains is written again from its stored target values, as if the others had never been
    made; nothing is optimised anew.

    `alphaedit rollback MODEL pack --null-space ns --out smaller-pack`
    """
    from alphaedit_peft import AlphaEditModel

    arguments.check_folder(out)
    refusal = "its batches cannot be taken back alone"
    before = arguments.read_alone(pack, refusal, ", then roll that back").edits
    moments = arguments.load_moments(key_moments)
    base, tokenizer, space = arguments.load_model_and_space(model, dtype, device, null_space)
    edited = AlphaEditModel.from_pretrained(
        base, pack, tokenizer=tokenizer, null_space=space, key_moments=moments
    )
    edited.rollback(batches)
    edited.save_pretrained(out)
    kept = {edit.id for edit in edited.edits}
    gone = [edit for edit in before if edit.id not in kept]
    facts = {
        "out": str(out),
        "taken_back": [edit.to_dict() for edit in gone],
        "remaining": [edit.to_dict() for edit in edited.edits],
    }
    rows = [(edit.id, edit.question, edit.target_new.strip()) for edit in gone]
    table = printing.table("Taken back", ["id", "prompt", "new target"], rows)
    printing.show(
        as_json, facts, table, f"Written to {out}: {printing.count(len(kept), 'edit')} remain"
    )


def _describe(pack: PackContents) -> dict[str, Any]:
    """A pack as plain JSON values."""
    return {
        "rank": pack.rank,
        "layers": list(pack.layers),
        "batches": list(pack.batches),
        "size_bytes": pack.size_bytes,
        "base_model": pack.config.base_model_name_or_path,
        "base": None if pack.base is None else pack.base.to_json(),
        "null_space": pack.null_space,
        "versions": pack.versions,
        "parents": list(pack.parents),
        "compression": None if pack.compression is None else pack.compression.to_json(),
        "contexts": list(pack.contexts),
        "config": pack.config.to_json(),
        "decisions": list(pack.decisions),
        "delta_norms": {name: delta.norm() for name, delta in pack.factors.items()},
        "records": [record.to_json() for record in pack.records],
    }


def _edit_table(pack: PackContents, listed: int | None) -> Table:
    rows = [
        (
            record.edit.id,
            record.edit.question,
            record.edit.target_new.strip() + ("" if record.role == "own" else f" ({record.role})"),
            record.batch,
            record.row,
            printing.probability(record.probability_before),
            printing.probability(record.probability_after),
        )
        for record in pack.records[:listed]
    ]
    columns = ["id", "prompt", "target", ">batch", ">row", ">P before", ">after"]
    return printing.table("Edits", columns, rows)
