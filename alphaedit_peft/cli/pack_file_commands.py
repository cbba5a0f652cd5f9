"""``alphaedit remove``, ``join``, ``compress`` and ``export``: packs of packs, without a model.

In: packs. Out: a pack, or a LoRA folder for servers, with the figures that say what it costs. They
call the functions that the methods of that name of ``EditPack`` call.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, BadParameter, Option

from alphaedit_peft.cli import arguments, printing

if TYPE_CHECKING:
    from rich.table import Table


Conflict = Literal["error", "first", "last"]
Layers = Literal["same", "union"]
Stored = Literal["float32", "bfloat16", "float16"]
Format = Literal["peft", "llama.cpp"]
FactorsOption = Annotated[Stored | None, Option(help="Of the factors; by default as they are.")]


def remove(
    pack: arguments.PackArgument,
    ids: Annotated[list[str], Argument(metavar="ID...", help="Ids that inspect shows.")],
    *,
    out: arguments.OutOption,
    max_share: Annotated[
        float, Option(min=0, max=1, help="Warn where more of an edit stays in force.")
    ] = 0.5,
    as_json: arguments.JsonOption = False,
) -> None:
    """Take edits out of a pack, without the model; the others stay as they are on their keys.

    What a removed edit shares with the others' keys stays in force; the table says how much. With
    the model at hand, `AlphaEditModel.remove_edits` leaves nothing.

    `alphaedit remove pack 3f2a9c81d07b --out smaller-pack`
    """
    from alphaedit_peft.pack.files import save_pack
    from alphaedit_peft.pack.remove import remove as take_out

    arguments.check_folder(out)
    read = arguments.read_pack(pack)
    removal = take_out(read, ids, max_share=max_share)
    save_pack(removal.pack, out)
    gone = {edit.id: edit for edit in read.edits if edit.id in removal.shares}
    facts = {
        "out": str(out),
        "removed": [edit.to_dict() for edit in gone.values()],
        "remaining": [edit.to_dict() for edit in removal.pack.edits],
        "shares_in_force": removal.shares,
    }
    rows = [
        (e.id, e.question, e.target_new.strip(), f"{removal.largest(e.id):.0%}")
        for e in gone.values()
    ]
    table = printing.table("Removed", ["id", "prompt", "target", ">still in force"], rows)
    left = printing.count(len(removal.pack.edits), "edit")
    verb = "remains" if len(removal.pack.edits) == 1 else "remain"
    printing.show(as_json, facts, table, f"Written to {out}: {left} {verb}")


def join(
    packs: Annotated[list[str], Argument(metavar="PACK...", help="Folders or Hub ids.")],
    *,
    out: arguments.OutOption,
    on_conflict: Annotated[
        Conflict, Option(help="Which pack keeps a key or prompt that two have.")
    ] = "error",
    layers: Annotated[
        Layers, Option(help="union: accept packs that edit different layers.")
    ] = "same",
    norm_guard: Annotated[
        float, Option(help="Most |Delta|, relative to unrelated packs; 0: none.")
    ] = 2.0,
    as_json: arguments.JsonOption = False,
) -> None:
    """Join packs of one base and one null space into one, without the model.

    A pack that was edited on top of another comes after it; the joined pack does what both did.

    `alphaedit join pack-a pack-b --out both`
    """
    from alphaedit_peft.pack.files import save_pack
    from alphaedit_peft.pack.join import JoinOptions
    from alphaedit_peft.pack.join import join as solve

    arguments.check_folder(out)
    names = [Path(name).name or name for name in packs]
    how = JoinOptions(on_conflict, norm_guard=norm_guard, layers=layers)
    distinct = len(set(names)) == len(names)
    read = [arguments.read_pack(name) for name in packs]
    found = solve(read, how, names if distinct else packs)
    save_pack(found.pack, out)
    figures = {
        name: {
            "largest_drift": float(joint.drift.max()) if len(joint.drift) else 0.0,
            "growth": joint.growth,
            "ridge": joint.ridge,
        }
        for name, joint in found.solved.items()
    }
    facts = {
        "out": str(out),
        "edits": len(found.pack.edits),
        "rank": found.pack.rank,
        "parents": list(found.pack.parents),
        "left_out": [vars(left) for left in found.left_out],
        "modules": figures,
    }
    columns = ["module", ">outputs off by", ">|Delta| growth", ">ridge"]
    rows = [(n, f["largest_drift"], f["growth"], f["ridge"]) for n, f in figures.items()]
    parts: list[Table | str] = [printing.table("Joined", columns, rows)]
    left_out = [(left.id, left.pack, left.reason) for left in found.left_out]
    parts += printing.filled("Left out", ["id", "pack", "reason"], left_out)
    edits = printing.count(len(found.pack.edits), "edit")
    printing.show(as_json, facts, *parts, f"Written to {out}: {edits}, rank {found.pack.rank}")


def compress(
    pack: arguments.PackArgument,
    *,
    out: arguments.OutOption,
    rank: Annotated[int | None, Option(min=1, help="Of every layer.")] = None,
    tolerance: Annotated[
        float | None, Option(help="Least rank whose relative error is within this.")
    ] = None,
    dtype: FactorsOption = None,
    as_json: arguments.JsonOption = False,
) -> None:
    """Make a pack smaller: a lower rank, a smaller dtype, or both.

    After a lower rank, edits can no longer be removed, joined or gone on from; keep the original.

    `alphaedit compress pack --tolerance 0.05 --dtype bfloat16 --out small`
    """
    from alphaedit_peft.pack.compress import compress as shrink
    from alphaedit_peft.pack.files import save_pack

    if rank is None and tolerance is None and dtype is None:
        raise BadParameter("give --rank, --tolerance or --dtype")
    arguments.check_folder(out)
    read = arguments.read_pack(pack)
    small = shrink(read, rank, tolerance, _torch_dtype(dtype))
    save_pack(small, out)
    assert small.compression is not None, "compress says what it did"
    facts = {"out": str(out), "rank": small.rank, "rank_before": read.rank}
    facts |= {"compression": small.compression.to_json()}
    columns = ["module", ">error of Delta", ">error of the edits' outputs"]
    rows = [
        (name, error, small.compression.output_errors[name])
        for name, error in small.compression.delta_errors.items()
    ]
    done = f"Written to {out}: rank {small.rank} of {read.rank}, {small.compression.dtype}"
    printing.show(as_json, facts, printing.table("Compressed", columns, rows), done)


def export(
    pack: arguments.PackArgument,
    *,
    out: arguments.OutOption,
    format: Annotated[Format, Option(help="llama.cpp: as its converter wants GPT-2's.")] = "peft",
    max_rank: Annotated[
        str | None, Option(metavar="N|vllm", help="Add rows of zeros up to this rank.")
    ] = None,
    dtype: FactorsOption = None,
    all_layers: Annotated[
        bool, Option("--all-layers", help="Zeros in blocks that were not edited, for TGI.")
    ] = False,
    num_blocks: Annotated[
        int | None, Option(min=1, help="Of the base, where the pack does not know.")
    ] = None,
    as_json: arguments.JsonOption = False,
) -> None:
    """Write a pack as a plain LoRA folder without sidecar, for servers.

    `alphaedit export pack --max-rank vllm --dtype bfloat16 --out lora`
    """
    from alphaedit_peft.pack.export import export as write_lora

    arguments.check_folder(out)
    if max_rank is not None and max_rank != "vllm" and not max_rank.isdecimal():
        raise BadParameter(f"--max-rank {max_rank!r} is not 1, 2, 3 ... or 'vllm'")
    read = arguments.read_alone(pack, "it cannot be exported alone")
    done = write_lora(
        read,
        out,
        format=format,
        max_rank=int(max_rank) if max_rank and max_rank.isdecimal() else max_rank,
        dtype=_torch_dtype(dtype),
        all_layers=all_layers,
        num_blocks=num_blocks,
    )
    facts = vars(done) | {"folder": str(out), "dtype": str(done.dtype).removeprefix("torch.")}
    worst = max(done.rounding_errors.values())
    rounding = f", rounded by {worst:.2g} at most" if worst else ""
    turned = ", factors transposed" if done.transposed else ""
    text = f"{printing.count(len(done.modules), 'module')} of rank {done.rank}, {facts['dtype']}"
    printing.show(as_json, facts, f"Written to {out}: {text}{rounding}{turned}")


def _torch_dtype(dtype: Stored | None) -> Any:
    import torch

    return None if dtype is None else getattr(torch, dtype)
