"""Seconds and memory of one layer's eigenvectors, from its key moments on.

Random keys, d_in of them and half as many again, whose squares fall by 1e4 from the first direction
to the last. d_in = 4096 takes half a minute on two cores, Llama-3-8B's 14336 a quarter of an hour.

    python docs/figures/measure_decomposition.py [D_IN] [FILE.json]
"""

import json
import sys
from pathlib import Path

import torch

from alphaedit_peft.nullspace.threshold import layer_space
from alphaedit_peft.studies.benchmark import machine

THRESHOLD, MODE = 0.02, "energy"


def random_moment(width):
    random = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -2, width)
    moment = torch.zeros(width, width)
    for _ in range(3):
        keys = torch.randn(width // 2, width, generator=random) * scale
        moment += keys.T @ keys
    return moment / (width // 2 * 3)


def main(width=4096, out=None):
    moment, found = random_moment(width), []
    with machine.PeakMemory(torch.device("cpu")) as memory:
        seconds = machine.timed(
            lambda: found.append(layer_space(moment, THRESHOLD, MODE)), moment.device
        )
    kept = found[0].basis
    error = float((kept.T @ kept - torch.eye(kept.shape[1])).abs().max())
    figures = {
        "machine": machine.describe_machine(moment.device),
        "d_in": width,
        "seconds": round(seconds, 1),
        "peak_bytes": memory.above,
        "stored": list(kept.shape),
        "off_orthonormal": error,
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if out:
        Path(out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:3])
