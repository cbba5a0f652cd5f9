"""A suite of cases in the embedded world: what to ask a model about which everything is known.

In: how many edits. Out: a :class:`Suite` whose prompts are phrasings and contexts that no edit is
made with, whose neighbours are not edited themselves, and which asks for everything else that the
edited people's model should still know.
"""

from __future__ import annotations

from random import Random
from typing import Any

from alphaedit_peft import embedded
from alphaedit_peft.edits import Edit
from alphaedit_peft.embedded.world import Fact, World, fill, relation_of
from alphaedit_peft.evaluation.cases import Case, Question, Suite

UNEDITED = 300
TEXTS = 200

FactKey = tuple[str, str]  # subject, relation


def embedded_suite(
    n: int,
    *,
    seed: int = 0,
    unedited: int = UNEDITED,
    texts: int = TEXTS,
    world: World | None = None,
) -> Suite:
    """Cases about ``n`` facts of the embedded world.

    The edits go around the people in a seeded order, one fact each, before anyone gets a second
    one. A case holds four paraphrases (two phrasings that no edit is requested with, each alone
    and after a plain sentence that the corpus does not hold), up to ten neighbours (other people
    with the same true answer, none of them edited in this relation), the other, unedited facts of
    the same person, three prompts to go on from, and sentences that are true of the new target.

    Args:
        n: how many edits, 1..1824.
        seed: of all choices; the same seed gives the first n of the same edits.
        unedited: facts of people whom no edit is about, at most; none are left from 304 edits on.
        texts: held-out plain sentences for perplexity, 0..400.
        world: another world than the embedded model's, for a model trained on it.

    Raises:
        ValueError: a number out of range.
    """
    world = world or embedded.world()
    for name, value, low, high in (
        ("n", n, 1, len(world.facts)),
        ("unedited", unedited, 0, len(world.facts)),
        ("texts", texts, 0, len(world.plain_sentences)),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name}={value} is outside what the world holds; use {low}..{high}")
    chosen = _choose(world, n, seed)
    edited = {_key(world.facts[i]) for i in chosen}
    records = world.records()
    cases = tuple(_case(world, records[i], i, edited, seed) for i in chosen)
    people = {subject for subject, _ in edited}
    others = [fact for fact in world.facts if fact.subject not in people]
    random = Random(f"{seed} unedited")
    asked = random.sample(others, min(unedited, len(others)))
    unedited_facts = tuple(_question(fact, random) for fact in asked)
    return Suite(cases, unedited_facts, world.plain_sentences[:texts])


def _choose(world: World, n: int, seed: int) -> list[int]:
    """Numbers of facts: every person once in a shuffled order, then every person again."""
    random = Random(f"{seed} edits")
    per = len(world.relations)
    people = random.sample(range(len(world.subjects)), len(world.subjects))
    orders = {person: random.sample(range(per), per) for person in people}
    return [person * per + orders[person][turn] for turn in range(per) for person in people][:n]


def _case(
    world: World, record: dict[str, Any], number: int, edited: set[FactKey], seed: int
) -> Case:
    fact, rewrite = world.facts[number], record["requested_rewrite"]
    random = Random(f"{seed} case {number}")
    new = rewrite["target_new"]["str"]
    edit = Edit(fact.subject, rewrite["prompt"], new, target_true=fact.object)
    bare = [fill(phrasing, fact.subject) for phrasing in relation_of(fact).paraphrases]
    same = [f for f in world.facts if f.relation == fact.relation and _key(f) not in edited]
    near = [f for f in same if f.object == fact.object]
    like = [f for f in same if f.object == new]
    own = [f for f in world.facts if f.subject == fact.subject and _key(f) not in edited]
    return Case(
        edit,
        paraphrases=(*bare, *(f"{random.choice(world.plain_sentences)} {text}" for text in bare)),
        neighborhood=tuple(_question(f, random) for f in random.sample(near, min(10, len(near)))),
        generation=tuple(record["generation_prompts"]),
        references=tuple(f"{_question(f, random).prompt} {new}." for f in like),
        same_subject=tuple(_question(f, random) for f in own),
    )


def _question(fact: Fact, random: Random) -> Question:
    return Question(fill(random.choice(relation_of(fact).prompts), fact.subject), fact.object)


def _key(fact: Fact) -> FactKey:
    return fact.subject, fact.relation
