"""Made-up edits and texts: random words in the lengths of the papers' data sets.

In: a tokenizer. Out: edits whose prompts, subjects and targets have as many tokens as those of
CounterFact and zsRE, with nothing of their text, and texts of random words for statistics. Time
depends on these lengths alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from transformers import PreTrainedTokenizerBase

from alphaedit_peft.edits import Edit
from alphaedit_peft.tokens import encode, require_offsets

FEWEST, ENOUGH = 8, 2000  # words to make edits of
SPACES = "ĠĊ▁"  # what stands for white space in vocabularies
BEFORE = "is"  # a word to put in front when words are tried


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
    """Edits of random words, each about a subject of its own.

    Args:
        tokenizer: a fast one; the words are tokens of its vocabulary.
        count: how many.
        requests: whose lengths, a name of ``LENGTHS``.
        seed: of the choice; torch's and Python's random state play no part.

    Raises:
        ValueError: an unknown name, a slow tokenizer, or too few words for so many edits.
    """
    if requests not in LENGTHS:
        raise ValueError(f"requests={requests!r} is unknown; use one of {sorted(LENGTHS)}")
    lengths, random = LENGTHS[requests], Random(seed)
    words = known_words(tokenizer, random)
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
    words = known_words(tokenizer, random)
    return [" ".join(random.choices(words, k=length)) for _ in range(-(-tokens // length))]


def known_words(tokenizer: PreTrainedTokenizerBase, random: Random) -> list[str]:
    """Up to 2,000 words that are one token each behind another word.

    Raises:
        ValueError: a slow tokenizer, or one with hardly a word.
    """
    require_offsets(tokenizer)
    vocabulary = sorted(tokenizer.get_vocab())
    alone = len(encode(tokenizer, BEFORE, special=False)[0])
    found: list[str] = []
    for token in random.sample(vocabulary, len(vocabulary)):
        word = token.strip(SPACES)
        if not (len(word) > 1 and word.isascii() and word.isalnum()):
            continue
        if len(encode(tokenizer, f"{BEFORE} {word}", special=False)[0]) == alone + 1:
            found.append(word)
        if len(found) == ENOUGH:
            break
    found = list(dict.fromkeys(found))
    if len(found) < FEWEST:
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__} has {len(found)} words of one token, too few to "
            "make edits up; give edits of your own"
        )
    return found
