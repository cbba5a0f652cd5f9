"""What a benchmark measures, made before the clock runs: a model, its edits, its statistics.

In: a model, or the shape of one (time depends on the shape, not on what a model knows). Out:
:class:`Subject`, with the paper's settings; edits of random words, with the lengths of CounterFact
or zsRE; and :class:`Statistics`, key moments and a null space, collected over texts of random words
or drawn at random, with the seconds that each part took.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.devices import computes_on
from alphaedit_peft.editing.contexts import STARTS
from alphaedit_peft.edits import Edit
from alphaedit_peft.messages import SHOWN, cut, one_line, sentence
from alphaedit_peft.nullspace import KeyMoments, NullSpace
from alphaedit_peft.nullspace.spectrum import LayerSpace
from alphaedit_peft.records import read_object
from alphaedit_peft.studies.benchmark.machine import clocked
from alphaedit_peft.tokens import encode, require_offsets


@dataclass(frozen=True, eq=False)
class Subject:
    """What is measured: a bare model, left with the bits it had, and the settings of its edits.

    ``tokenizer`` is a fast one, ``config`` not resolved (see ``benchmark_config``); ``random`` says
    whether the weights are.
    """

    name: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    config: AlphaEditConfig
    random: bool = True

    @property
    def weights(self) -> Tensor:
        """The input embeddings: they tell the model's dtype; empty where kept elsewhere."""
        return self.model.get_input_embeddings().weight  # type: ignore[operator]

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return computes_on(self.model.get_input_embeddings())  # type: ignore[operator]


@dataclass(frozen=True, eq=False)
class Statistics:
    """A null space and key moments of one model, and the seconds that making them took."""

    null_space: NullSpace
    key_moments: KeyMoments | None = None
    origin: str = "given"
    seconds: Mapping[str, float] = field(default_factory=dict)


def benchmark_config(
    rewrite_layers: Sequence[int] | None = None,
    *,
    steps: int | None = None,
    stop_loss: float = 0.0,
    autocast: str | None = None,
    seed: int = 0,
) -> AlphaEditConfig:
    """The paper's settings, but that every step is run, and nothing is warned of.

    No edit of a random model would reach the paper's ``stop_loss``, so it is 0 by default, for
    every model and on both sides of a comparison. ``rewrite_layers`` and ``steps`` (loss
    evaluations) of None are the paper's for a model of that shape, else by depth, and 25; ``seed``
    is of the contexts.
    """
    values = {"autocast": autocast} if autocast else {}
    return replace(
        AlphaEditConfig.from_json({"preset": "paper", **values}),
        rewrite_layers=None if rewrite_layers is None else list(rewrite_layers),
        steps=steps,
        stop_loss=stop_loss,
        seed=seed,
        on_conflict="replace",
        capacity_bound=0,
    )


@dataclass(frozen=True)
class Shape:
    """A table row: a transformers config's type and fields, and the rewrite layers if not known."""

    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    rewrite_layers: tuple[int, ...] | None = None


ENDS = {"bos_token_id": 0, "eos_token_id": 0}


def _llama(*sizes: int, **more: int) -> dict[str, int]:
    """Fields of a Llama: widths of the hidden state and the MLP, blocks, heads, key-value heads."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads")
    return {**dict(zip((*names, *heads), sizes, strict=True)), **more}


# The lab shapes are small ones of the same families: five rewrite layers that end at the depth of
# the large model's, and as many token ids as give the output head the large model's share of the
# arithmetic.
SHAPES: dict[str, Shape] = {
    "gpt2-xl": Shape("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "gpt-j-6b": Shape("gptj", {"n_embd": 4096, "n_layer": 28, "n_head": 16}),
    "llama-3-8b": Shape(
        "llama",
        _llama(4096, 14336, 32, 32, 8, max_position_embeddings=8192, vocab_size=128256),
    ),
    "lab-gpt2": Shape(
        "gpt2",
        {"n_embd": 512, "n_layer": 16, "n_head": 8, "vocab_size": 5120, **ENDS},
        (1, 2, 3, 4, 5),
    ),
    "lab-gptj": Shape(
        "gptj",
        {"n_embd": 512, "n_layer": 14, "n_head": 8, "rotary_dim": 32, "vocab_size": 3072, **ENDS},
        (0, 1, 2, 3, 4),
    ),
    "lab-llama": Shape(
        "llama", _llama(512, 1792, 16, 8, 2, vocab_size=7168, **ENDS), (0, 1, 2, 3, 4)
    ),
}


def read_shape(shape: str | Path) -> Shape:
    """A shape by its name, or from a ``config.json`` or the folder that holds one.

    Raises:
        FileNotFoundError: neither a name nor a file.
        ValueError: a file that is no model's config.
    """
    if str(shape) in SHAPES:
        return SHAPES[str(shape)]
    path = Path(shape)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"shape {str(shape)!r} is neither one of {sorted(SHAPES)} nor a config.json or a "
            "folder with one"
        )
    try:
        values = read_object(path)
        return Shape(values.pop("model_type"), values)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        wrong = f"it is no model's config ({type(error).__name__}: {error})"
        raise ValueError(sentence(path, wrong, "it needs JSON with a model_type")) from error


def shape_config(shape: Shape) -> PretrainedConfig:
    """The transformers config of a shape; ValueError where transformers does not know it."""
    try:
        return AutoConfig.for_model(shape.model_type, **shape.fields)
    except Exception as error:  # each family checks its fields in its own way
        raise ValueError(
            f"model_type={shape.model_type!r} makes no config: {_shortly(error)}"
        ) from error


def random_model(
    config: PretrainedConfig, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> nn.Module:
    """A causal language model with random weights, in evaluation mode.

    Every weight is made in its own dtype on its own device, so no larger copy of the model ever
    exists. The same seed on the same device gives the same bits; torch's random state is left as it
    was. ValueError: a config that makes no causal language model.
    """
    place = torch.device(device)
    gpus = [place] if place.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus), place:
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"model_type={config.model_type!r} makes no causal language model: "
                f"{_shortly(error)}"
            ) from error
    return model.eval().requires_grad_(False)


def _shortly(error: Exception) -> str:
    """An error of transformers, which may be long, in one line."""
    return cut(one_line(error) or type(error).__name__, SHOWN)


WORDS = ("</s>", "<unk>", ".", "is", "a", *STARTS)


def stand_in_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose every id is one made-up word, so that a text has a known number of tokens.

    Raises:
        ValueError: fewer ids than edits can be made of.
    """
    least = len(WORDS) + 8
    if vocabulary < least:
        raise ValueError(f"a vocabulary of {vocabulary} ids is too small; {least} are needed")
    words = [*WORDS, *(f"w{number}" for number in range(len(WORDS), vocabulary))]
    ids = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


@dataclass(frozen=True)
class Lengths:
    """How many tokens the parts of an edit have: one of each tuple, equally likely."""

    before: tuple[int, ...]
    subject: tuple[int, ...]
    after: tuple[int, ...]
    target: tuple[int, ...]


# Quartiles of GPT-2 tokens. CounterFact: nothing mostly, 3 to 5, 2 to 4, 1; zsRE: 3 to 5, 3 to 5,
# 1 to 3, 2 to 4.
LENGTHS = {
    "counterfact": Lengths((0, 0, 0, 3), (3, 4, 5), (3, 4, 5), (1,)),
    "zsre": Lengths((3, 4, 5), (3, 4, 5), (2, 3, 4), (2, 3, 4)),
}


def made_up_edits(
    tokenizer: PreTrainedTokenizerBase, count: int, requests: str = "counterfact", seed: int = 0
) -> tuple[Edit, ...]:
    """Edits of random words of a fast tokenizer's, each about a subject of its own.

    ``requests`` says whose lengths they have, a name of ``LENGTHS``; ``seed`` alone decides the
    choice: torch's and Python's random state play no part.

    Raises:
        ValueError: an unknown name, a slow tokenizer, or too few words for so many edits.
    """
    if requests not in LENGTHS:
        raise ValueError(f"requests={requests!r} is unknown; use one of {sorted(LENGTHS)}")
    lengths, random = LENGTHS[requests], Random(seed)
    words = _known_words(tokenizer, random)
    possible = sum(len(words) ** length for length in set(lengths.subject))
    if 2 * count > possible:
        raise ValueError(
            f"{len(words)} words make {possible} subjects, too few to draw {count} different ones; "
            "take fewer edits, or give edits of your own"
        )
    edits: dict[str, Edit] = {}
    while len(edits) < count:
        before, subject, after, target = (
            " ".join(random.choices(words, k=random.choice(choices)))
            for choices in (lengths.before, lengths.subject, lengths.after, lengths.target)
        )
        edits.setdefault(subject, Edit(subject, f"{before} {{}} {after}".strip(), target))
    return tuple(edits.values())


def random_texts(
    tokenizer: PreTrainedTokenizerBase, tokens: int, length: int = 100, seed: int = 0
) -> list[str]:
    """Texts of ``length`` random words, at least ``tokens`` in all."""
    random = Random(seed)
    words = _known_words(tokenizer, random)
    return [" ".join(random.choices(words, k=length)) for _ in range(-(-tokens // length))]


FEWEST, ENOUGH = 8, 2000  # words to make edits of


def _known_words(tokenizer: PreTrainedTokenizerBase, random: Random) -> list[str]:
    """Up to 2,000 words that are one token each behind another word."""
    require_offsets(tokenizer)
    vocabulary = sorted(tokenizer.get_vocab())
    words = (token.strip("ĠĊ▁") for token in random.sample(vocabulary, len(vocabulary)))
    plain = (word for word in words if len(word) > 1 and word.isascii() and word.isalnum())

    def length(text: str) -> int:
        return len(encode(tokenizer, text, special=False)[0])

    alone = length("is")
    known = (word for word in plain if length(f"is {word}") == alone + 1)
    found = list(dict.fromkeys(islice(known, ENOUGH)))
    if len(found) < FEWEST:
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__} has {len(found)} words of one token, too few to "
            "make edits up; give edits of your own"
        )
    return found


RAISED = 1e-3  # of the mean eigenvalue, added to every one
MODE = "rank"


def collect_statistics(subject: Subject, tokens: int | None = None, seed: int = 0) -> Statistics:
    """Key moments over texts of random words, and the null space that keeps half the directions.

    Half is the dearest choice: a thinner null space, or a thinner complement, projects in less. A
    thousandth of the mean eigenvalue is added to each, so that MEMIT can invert moments of so few
    and such even texts. ``tokens`` of None are twice the width of the rewrite modules.

    Raises:
        ValueError: fewer tokens than the rewrite modules are wide, or a model or tokenizer that
            cannot be used.
    """
    _, width = _rewritten(subject)
    wanted = 2 * width if tokens is None else tokens  # so that moments can be inverted
    texts = random_texts(subject.tokenizer, wanted, seed=seed)

    def collect() -> KeyMoments:
        of = (subject.model, subject.tokenizer, texts, subject.config)
        found = KeyMoments.collect(*of, max_tokens=wanted, progress=False)
        for moment in found.moments.values():
            moment.diagonal().add_(RAISED * moment.diagonal().mean())
        return found

    moments, collected = clocked(collect, subject.device)
    with warnings.catch_warnings():  # that ten tokens for each direction are advised
        warnings.simplefilter("ignore", UserWarning)
        halved = partial(moments.null_space, width // 2, MODE, reach=1.0)
        space, decomposed = clocked(halved, subject.device)
    seconds = {"collected": collected, "decomposed": decomposed}
    return Statistics(space, moments, f"{moments.tokens} tokens, random words", seconds)


def random_statistics(subject: Subject, seed: int = 0) -> Statistics:
    """A random half of all directions as null space, and moments of random keys: made quickly.

    For widths whose eigenvectors take long. The shapes, and so the times of edits, are those of
    collected statistics.
    """
    names, width = _rewritten(subject)
    random = torch.Generator(subject.device).manual_seed(seed)
    moments, parts = {}, {}

    def draw() -> None:
        for layer in names:
            keys = torch.randn(2 * width, width, generator=random, device=subject.device)
            parts[layer] = random_half(width, random)
            moments[layer] = (keys.T @ keys / (2 * width)).cpu()

    _, drawn = clocked(draw, subject.device)
    space = NullSpace(parts, width - width // 2, MODE, 2 * width)
    key_moments = KeyMoments(moments, 2 * width, names)
    return Statistics(space, key_moments, "random keys", {"drawn": drawn})


def random_half(width: int, random: torch.Generator) -> LayerSpace:
    """A random half of all directions, drawn where the generator is, and rising eigenvalues."""
    drawn = torch.randn(width, width // 2, generator=random, device=random.device)
    return LayerSpace(torch.linalg.qr(drawn).Q.cpu(), torch.linspace(0, 1, width), False)


def _rewritten(subject: Subject) -> tuple[dict[int, str], int]:
    """The rewrite modules' names by layer, and their d_in."""
    full, architecture = subject.config.resolve(subject.model)
    names = {layer: architecture.rewrite_name(layer) for layer in full.rewrite_layers or [0]}
    return names, architecture.width(subject.model, next(iter(names)))
