"""Models about which everything is known beforehand: the metrics must say so."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

SURE = 50.0  # logit of what a model is certain of


class Uniform(nn.Module):
    """Finds every token equally likely."""

    def __init__(self, vocabulary: int = 320) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, self.vocabulary))


class Constant(Uniform):
    """Always foretells one and the same token."""

    def __init__(self, token: int, vocabulary: int = 320) -> None:
        super().__init__(vocabulary)
        self.token = token

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        logits = super().forward(input_ids).logits
        logits[..., self.token] = SURE
        return SimpleNamespace(logits=logits)


class Says(Uniform):
    """Foretells the tokens of given texts, each after the whole text before it, else nothing."""

    def __init__(self, tokenizer, texts, vocabulary: int = 320) -> None:
        super().__init__(vocabulary)
        self.following = {}
        for text in texts:
            ids = tuple(tokenizer(text)["input_ids"])
            self.following |= {ids[:i]: ids[i] for i in range(1, len(ids))}

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        logits = super().forward(input_ids).logits
        for r, row in enumerate(input_ids.tolist()):
            for p in range(len(row)):
                if tuple(row[: p + 1]) in self.following:
                    logits[r, p, self.following[tuple(row[: p + 1])]] = SURE
        return SimpleNamespace(logits=logits)
