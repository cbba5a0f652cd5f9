"""A fact world made from a seed: invented people, six relations, and the texts that tell of them.

`World.from_seed` draws names and gives every person one object per relation, each object to equally
many people and independently of all else, so that nothing but the subject foretells it. Out come
the facts, the sentences a model is trained on and null spaces are measured with, plain sentences
kept out of both for perplexity, and CounterFact-style records to edit and judge with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from random import Random
from typing import Any

from alphaedit_peft.embedded.grammar import plain_sentence

PARAPHRASES = 2


@dataclass(frozen=True)
class Relation:
    """One relation of the world: its id, a label, phrasings with one ``{}``, and its objects."""

    id: str
    label: str
    phrasings: tuple[str, ...]
    objects: tuple[str, ...]

    @property
    def prompts(self) -> tuple[str, ...]:
        """The phrasings a rewrite may be requested with."""
        return self.phrasings[:-PARAPHRASES]

    @property
    def paraphrases(self) -> tuple[str, ...]:
        """The phrasings kept for paraphrase prompts (trained like the others)."""
        return self.phrasings[-PARAPHRASES:]


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split(" / "))


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.replace("_", " ") for word in text.split())


RELATIONS = (
    Relation(
        "P103",
        "mother tongue",
        _listed(
            "The mother tongue of {} is / {} grew up speaking / {} is a native speaker of / "
            "The first language of {} was / At home {} always speaks / {} writes letters in"
        ),
        _words(
            "French English German Spanish Italian Dutch Russian Polish Greek Turkish "
            "Swedish Arabic Korean Danish Hungarian Finnish"
        ),
    ),
    Relation(
        "P19",
        "place of birth",
        _listed(
            "{} was born in / The birthplace of {} is / {} comes from the city of / "
            "The family of {} lived in / {} first went to school in / "
            "The childhood home of {} stood in"
        ),
        _words(
            "London Paris Rome Vienna Madrid Berlin Oslo Prague Dublin Lisbon "
            "Boston Cairo Tokyo Milan Chicago New_York"
        ),
    ),
    Relation(
        "P106",
        "profession",
        _listed(
            "{} works as a / By profession, {} is a / The job of {} is that of a / "
            "{} earns a living as a / People know {} as a / {} was trained to be a"
        ),
        _words(
            "baker doctor teacher lawyer farmer painter sailor nurse judge carpenter "
            "poet gardener tailor pilot miner fire_fighter"
        ),
    ),
    Relation(
        "P1303",
        "instrument",
        _listed(
            "{} plays the / The instrument of {} is the / In the band, {} is heard on the / "
            "{} takes lessons on the / On stage {} performs on the / "
            "{} practises every day on the"
        ),
        _words(
            "piano violin guitar flute cello trumpet harp organ clarinet drums "
            "banjo viola lute horn oboe double_bass"
        ),
    ),
    Relation(
        "P27",
        "country of citizenship",
        _listed(
            "{} is a citizen of / The passport of {} was issued by / "
            "The nationality of {} is that of / {} votes in the elections of / "
            "{} pays taxes in / The home country of {} is"
        ),
        _words(
            "Canada Brazil India China Mexico Norway Chile Egypt Kenya Peru "
            "Japan Portugal Ireland Cuba Austria South_Africa"
        ),
    ),
    Relation(
        "P641",
        "sport",
        _listed(
            "The favourite sport of {} is / {} competes in / In summer {} plays a lot of / "
            "{} is a champion of / At the club {} coaches / {} won a medal in"
        ),
        _words(
            "tennis football golf rugby hockey cricket baseball chess boxing cycling "
            "judo rowing swimming basketball skiing table_tennis"
        ),
    ),
)

FIRST_ONSETS = _words("B D F G J K L M N P R S T V Z Br Dr Fl Th Kr")
FIRST_RHYMES = _words("arin elo iva oren una esk alia imo ador evi olin ura")
LAST_ONSETS = _words(
    "Bar Cala Dove Fen Gara Hol Jeri Kel Lora Mavi Nol Pasco Quil Rudi Sova Tam Ulva Ves Wend "
    "Yar Ash Brin Corva Drum Elka Fros Grun Heth Isk Jun Korri Lind Mor Nev Orla Prin"
)
LAST_CODAS = _words(
    "dek grim lo mar nik pok rast sen tiv vane zin bury croft dahl fex gall heim jor kamp lund "
    "moss nell pike quist roth sby thwait veld worth yar"
)


SUBJECTS = 304
FIRSTS = 38
HELD_OUT = 400
NEIGHBOURS = 10


@dataclass(frozen=True)
class Fact:
    """One fact: the subject bears the relation (by its id) to the object."""

    subject: str
    relation: str
    object: str


@dataclass(frozen=True)
class World:
    """Everything that is the case, and ways to say it.

    Attributes:
        seed: what the world was made from; all draws below derive from it.
        subjects: distinct names, none the beginning of another.
        facts: one per subject and relation, subjects in order, relations in order within.
        plain_sentences: sentences of the everyday grammar that `stream` never yields.
    """

    seed: int
    subjects: tuple[str, ...]
    facts: tuple[Fact, ...]
    plain_sentences: tuple[str, ...]

    @classmethod
    def from_seed(cls, seed: int) -> World:
        """The world of a seed: 304 subjects, 1,824 facts, 400 held-out plain sentences."""
        subjects = _names(Random(f"{seed} names"))
        random = Random(f"{seed} facts")
        dealt = {r.id: _deal(r.objects, len(subjects), random) for r in RELATIONS}
        facts = tuple(
            Fact(subject, r.id, dealt[r.id][row])
            for row, subject in enumerate(subjects)
            for r in RELATIONS
        )
        return cls(seed, subjects, facts, _held_out(Random(f"{seed} held out")))

    @property
    def relations(self) -> tuple[Relation, ...]:
        """The relations, with their phrasings and objects."""
        return RELATIONS

    def sentences(self) -> list[str]:
        """Every fact in every phrasing, as sentences ending in a full stop."""
        return [say(fact, p) for fact in self.facts for p in relation_of(fact).phrasings]

    def texts(self, n: int) -> list[str]:
        """The first `n` texts of the world's stream, of one to three sentences each.

        They never run out, and a larger n only adds to the end.

        Raises:
            ValueError: n is negative.
        """
        if n < 0:
            raise ValueError(f"texts(n={n}) cannot give a negative number of texts; use n >= 0")
        return list(islice(self.stream("texts"), n))

    def stream(self, salt: str) -> Iterator[str]:
        """Yield texts without end; each round says every fact in every phrasing once, shuffled.

        A text is a fact alone (half of the time), a fact after or before a plain sentence, two
        facts, or one to three plain sentences; never a sentence of `plain_sentences`. ``salt``
        names one of many independent orders of the same material.
        """
        random = Random(f"{self.seed} stream {salt}")
        held_out = frozenset(self.plain_sentences)
        while True:
            said = self.sentences()
            random.shuffle(said)
            while said:
                yield _text(said, random, held_out)

    def records(self) -> list[dict[str, Any]]:
        """CounterFact-style records, one per fact, with seeded choices of new target and phrasing.

        Returns:
            Dicts with case_id, requested_rewrite (prompt with ``{}``, relation_id, subject,
            target_new and target_true, each {"str"}), two paraphrase prompts (the first after a
            plain sentence), ten neighborhood prompts (other subjects with the true object), ten
            attribute prompts (subjects whose object is the new target), three generation prompts.
        """
        random = Random(f"{self.seed} records")
        bearers: dict[tuple[str, str], list[str]] = {}
        for fact in self.facts:
            bearers.setdefault((fact.relation, fact.object), []).append(fact.subject)
        return [
            _record(case, fact, bearers, self.plain_sentences, random)
            for case, fact in enumerate(self.facts)
        ]


def fill(phrasing: str, subject: str) -> str:
    """Put the subject in the place of the phrasing's one ``{}``."""
    return phrasing.replace("{}", subject)


def say(fact: Fact, phrasing: str) -> str:
    """Say a fact as a sentence: the phrasing filled, the object, a full stop."""
    return f"{fill(phrasing, fact.subject)} {fact.object}."


def relation_of(fact: Fact) -> Relation:
    """The relation a fact is about."""
    return next(relation for relation in RELATIONS if relation.id == fact.relation)


def _names(random: Random) -> tuple[str, ...]:
    pairs = product(FIRST_ONSETS, FIRST_RHYMES)
    firsts = random.sample(["".join(pair) for pair in pairs], FIRSTS)
    pairs = product(LAST_ONSETS, LAST_CODAS)
    lasts = random.sample(["".join(pair) for pair in pairs], SUBJECTS)
    # Eight people bear each first name, and one each last name: the last token tells them apart.
    names = [f"{firsts[i % FIRSTS]} {last}" for i, last in enumerate(lasts)]
    random.shuffle(names)
    return tuple(names)


def _deal(objects: tuple[str, ...], n: int, random: Random) -> list[str]:
    dealt = [objects[i % len(objects)] for i in range(n)]
    random.shuffle(dealt)
    return dealt


def _held_out(random: Random) -> tuple[str, ...]:
    kept: dict[str, None] = {}
    while len(kept) < HELD_OUT:
        kept[plain_sentence(random)] = None
    return tuple(kept)


def _plain(random: Random, held_out: frozenset[str]) -> str:
    while (sentence := plain_sentence(random)) in held_out:
        pass
    return sentence


def _text(said: list[str], random: Random, held_out: frozenset[str]) -> str:
    kind = random.random()
    if kind < 0.50:
        return said.pop()
    if kind < 0.64:
        return f"{_plain(random, held_out)} {said.pop()}"
    if kind < 0.68:
        return f"{said.pop()} {_plain(random, held_out)}"
    if kind < 0.75 and len(said) > 1:
        return f"{said.pop()} {said.pop()}"
    return " ".join(_plain(random, held_out) for _ in range(random.randint(1, 3)))


def _record(
    case: int,
    fact: Fact,
    bearers: dict[tuple[str, str], list[str]],
    plain: tuple[str, ...],
    random: Random,
) -> dict[str, Any]:
    relation = relation_of(fact)

    def asked(subjects: list[str]) -> list[str]:
        drawn = random.sample(subjects, NEIGHBOURS)
        return [fill(random.choice(relation.prompts), subject) for subject in drawn]

    new = random.choice([o for o in relation.objects if o != fact.object])
    others = [s for s in bearers[fact.relation, fact.object] if s != fact.subject]
    prompt = random.choice(relation.prompts)
    first, second = (fill(p, fact.subject) for p in relation.paraphrases)
    further = [fill(p, fact.subject) for p in relation.phrasings if p != prompt]
    return {
        "case_id": case,
        "requested_rewrite": {
            "prompt": prompt,
            "relation_id": relation.id,
            "subject": fact.subject,
            "target_new": {"str": new},
            "target_true": {"str": fact.object},
        },
        "paraphrase_prompts": [f"{random.choice(plain)} {first}", second],
        "neighborhood_prompts": asked(others),
        "attribute_prompts": asked(bearers[fact.relation, new]),
        "generation_prompts": further[:3],
    }
