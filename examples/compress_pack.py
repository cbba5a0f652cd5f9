"""Make a pack smaller step by step, and see what that costs: its updates, and its edits' outputs.

python examples/compress_pack.py PACK
"""

import sys

import torch

from alphaedit_peft import EditPack


def main(folder: str) -> None:
    pack = EditPack.from_pretrained(folder)
    tries = [{"dtype": dtype} for dtype in (torch.bfloat16, torch.float16)]
    tries += [{"rank": max(1, pack.rank * share // 100)} for share in (95, 90, 75, 50, 25)]
    print("| rank | dtype | Delta off by | outputs of the edits off by |\n|---|---|---|---|")
    for given in tries:
        small = pack.compress(**given)
        made = small.compression
        worst = [max(errors.values()) for errors in (made.delta_errors, made.output_errors)]
        print(f"| {small.rank} of {pack.rank} | {made.dtype} | {worst[0]:.1%} | {worst[1]:.1%} |")


if __name__ == "__main__":
    main(*sys.argv[1:2])
