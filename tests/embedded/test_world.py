"""Laws of the fact world: what a seed decides, names, phrasings, balance, texts and records."""

from collections import Counter
from itertools import pairwise

import pytest

from alphaedit_peft.embedded.world import HELD_OUT, PARAPHRASES, SUBJECTS, World, relation_of, say


@pytest.fixture(scope="module")
def world() -> World:
    return World.from_seed(0)


@pytest.fixture(scope="module")
def objects(world: World) -> dict[tuple[str, str], str]:
    return {(fact.subject, fact.relation): fact.object for fact in world.facts}


def subject_in(prompt: str, world: World) -> str:
    (subject,) = (name for name in world.subjects if name in prompt)
    return subject


def test_same_seed_gives_the_same_world(world: World) -> None:
    again = World.from_seed(0)
    assert again == world
    assert again.texts(50) == world.texts(50)
    assert again.records()[:20] == world.records()[:20]


def test_other_seed_gives_other_names_and_facts(world: World) -> None:
    other = World.from_seed(1)
    assert set(other.facts) != set(world.facts)
    assert other.subjects != world.subjects


@pytest.mark.parametrize("seed", range(5))
def test_names_are_distinct_and_none_begins_another(seed: int) -> None:
    names = sorted(World.from_seed(seed).subjects)
    assert len(set(names)) == SUBJECTS
    # In sorted order a name that begins another begins its direct successor.
    assert not any(b.startswith(a) for a, b in pairwise(names))


def test_first_names_are_shared_and_last_names_are_not(world: World) -> None:
    firsts = Counter(name.split()[0] for name in world.subjects)
    lasts = Counter(name.split()[1] for name in world.subjects)
    assert set(firsts.values()) == {8}
    assert set(lasts.values()) == {1}


def test_every_phrasing_has_one_slot_and_is_its_own(world: World) -> None:
    phrasings = [phrasing for relation in world.relations for phrasing in relation.phrasings]
    assert all(phrasing.count("{}") == 1 for phrasing in phrasings)
    assert len(set(phrasings)) == len(phrasings)
    for relation in world.relations:
        assert len(relation.phrasings) >= 6
        assert relation.prompts + relation.paraphrases == relation.phrasings
        assert len(relation.paraphrases) == PARAPHRASES


def test_no_object_begins_another_of_its_relation(world: World) -> None:
    for relation in world.relations:
        ordered = sorted(relation.objects)
        assert not any(b.startswith(a) for a, b in pairwise(ordered))


def test_objects_are_dealt_evenly(world: World) -> None:
    for relation in world.relations:
        counts = Counter(f.object for f in world.facts if f.relation == relation.id)
        assert set(counts) == set(relation.objects)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_sentences_say_every_fact_in_every_phrasing(world: World) -> None:
    sentences = world.sentences()
    assert len(set(sentences)) == len(sentences) == 6 * len(world.facts)
    fact = world.facts[0]
    assert say(fact, relation_of(fact).phrasings[0]) in sentences
    assert all(sentence.endswith(".") and "{" not in sentence for sentence in sentences)


def test_one_round_of_the_stream_says_every_sentence_once(world: World) -> None:
    missing, told = set(world.sentences()), Counter[str]()
    stream = world.stream("any salt")
    while missing:
        parts = [f"{part}." for part in next(stream).rstrip(".").split(". ")]
        told.update(parts)
        missing.difference_update(parts)
    assert {told[sentence] for sentence in world.sentences()} == {1}


def test_more_texts_only_add_to_the_end(world: World) -> None:
    assert world.texts(100)[:40] == world.texts(40)
    assert world.texts(0) == []


def test_negative_number_of_texts_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match=r"texts\(n=-3\)"):
        world.texts(-3)


def test_held_out_sentences_are_in_no_text(world: World) -> None:
    assert len(set(world.plain_sentences)) == HELD_OUT
    held_out = set(world.plain_sentences)
    for text in world.texts(5_000):
        assert text not in held_out
        assert not any(f"{part}." in held_out for part in text.rstrip(".").split(". "))


def test_plain_sentences_are_sentences_without_subjects(world: World) -> None:
    for sentence in world.plain_sentences:
        assert sentence[0].isupper()
        assert sentence.endswith(".")
        assert "<" not in sentence
        assert not any(name in sentence for name in world.subjects)


def test_plain_sentences_open_as_sampled_contexts_do(world: World) -> None:
    openings = {sentence.split()[0].rstrip(",") for sentence in world.plain_sentences}
    assert {"The", "Therefore", "Because", "I", "You"} <= openings


def test_records_have_counterfact_layout(world: World) -> None:
    records = world.records()
    assert len(records) == len(world.facts)
    assert [record["case_id"] for record in records] == list(range(len(records)))
    for record, fact in zip(records, world.facts, strict=True):
        rewrite = record["requested_rewrite"]
        assert rewrite["subject"] == fact.subject
        assert rewrite["prompt"] in relation_of(fact).prompts
        assert rewrite["relation_id"] == fact.relation
        assert rewrite["target_true"] == {"str": fact.object}
        assert rewrite["target_new"]["str"] in relation_of(fact).objects
        assert rewrite["target_new"] != rewrite["target_true"]
        assert len(record["generation_prompts"]) == 3
        assert all(fact.subject in prompt for prompt in record["generation_prompts"])


def test_paraphrases_tell_the_same_fact_otherwise(world: World) -> None:
    for record, fact in zip(world.records(), world.facts, strict=True):
        first, second = record["paraphrase_prompts"]
        ends = [p.replace("{}", fact.subject) for p in relation_of(fact).paraphrases]
        assert first.endswith(f". {ends[0]}")
        assert first.removesuffix(f" {ends[0]}") in world.plain_sentences
        assert second == ends[1]


@pytest.mark.parametrize(
    ("field", "target"),
    [("neighborhood_prompts", "target_true"), ("attribute_prompts", "target_new")],
)
def test_other_subjects_of_a_record_bear_the_object(
    world: World, objects: dict[tuple[str, str], str], field: str, target: str
) -> None:
    for record in world.records()[::29]:
        rewrite = record["requested_rewrite"]
        others = [subject_in(prompt, world) for prompt in record[field]]
        assert len(set(others)) == 10
        assert rewrite["subject"] not in others
        held = {objects[other, rewrite["relation_id"]] for other in others}
        assert held == {rewrite[target]["str"]}
