"""Time of collecting key moments, beside the least it can take.

The least: the forward pass of the blocks up to the last rewrite layer, and 2 d_in^2 operations for
each token and rewrite layer at the machine's matrix rate.

    python docs/figures/measure_statistics.py [SHAPE] [TOKENS]
"""

import sys
from functools import partial
from statistics import median

import torch
from tqdm import tqdm

from alphaedit_peft import AlphaEditConfig, hooks
from alphaedit_peft.nullspace.corpus import token_batches
from alphaedit_peft.nullspace.moments import collect_sums
from alphaedit_peft.studies.benchmark import machine, subject

RUNS, WINDOW = 5, 128


@torch.no_grad()
def forward(model, names, batches):
    for batch in batches:
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask.long()}
        hooks.run_until(model, inputs, names[-1], entering=True)


def main(shape="lab-gptj", tokens=16384):
    shape, cpu = subject.read_shape(shape), torch.device("cpu")
    model = subject.random_model(subject.shape_config(shape), torch.float32, cpu)
    tokenizer = subject.stand_in_tokenizer(model.config.vocab_size)
    config, layout = AlphaEditConfig(rewrite_layers=list(shape.rewrite_layers)).resolve(model)
    names = [layout.rewrite_name(layer) for layer in config.rewrite_layers]
    texts = subject.random_texts(tokenizer, tokens)
    limits = {"window": WINDOW, "tokens_per_batch": config.tokens_per_batch, "max_tokens": tokens}
    batches = list(token_batches(texts, tokenizer, **limits))
    whole = partial(collect_sums, model, names, batches, bar=tqdm(disable=True))
    width = len(next(iter(whole().matrices.values())))
    padding = sum(batch.mask.numel() for batch in batches) / tokens - 1
    print(f"{len(names)} layers, d_in {width}, {tokens} tokens, padding {padding:.1%}")
    times = []
    for _ in range(RUNS):  # in turn, since other programs come and go
        rate = machine.matrix_rate(torch.float32, cpu)
        below = machine.timed(partial(forward, model, names, batches), cpu)
        products = 2 * width**2 * tokens * len(names) / rate
        seconds = machine.timed(whole, cpu)
        times.append((seconds, below, products, seconds / (below + products)))
    for k, name in enumerate(("statistics", "forward", "products", "ratio")):
        column = [run[k] for run in times]
        print(f"{name:10} {median(column):8.2f}   {min(column):.2f} to {max(column):.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
