"""The words of the embedded world: relations with their phrasings and objects, and name syllables.

Data only, read by `world`. A relation holds phrasings with one ``{}`` for the subject and nothing
after the object but a full stop, the last two of which serve as paraphrases in records, and sixteen
objects that no other object of the relation begins with, so that a continuation names one at most.
Relation ids are Wikidata's, as in CounterFact; every subject is invented.
"""

from dataclasses import dataclass

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


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip().replace("_", " ") for word in text.split())


RELATIONS = (
    Relation(
        "P103",
        "mother tongue",
        (
            "The mother tongue of {} is",
            "{} grew up speaking",
            "{} is a native speaker of",
            "The first language of {} was",
            "At home {} always speaks",
            "{} writes letters in",
        ),
        _words(
            "French English German Spanish Italian Dutch Russian Polish Greek Turkish "
            "Swedish Arabic Korean Danish Hungarian Finnish"
        ),
    ),
    Relation(
        "P19",
        "place of birth",
        (
            "{} was born in",
            "The birthplace of {} is",
            "{} comes from the city of",
            "The family of {} lived in",
            "{} first went to school in",
            "The childhood home of {} stood in",
        ),
        _words(
            "London Paris Rome Vienna Madrid Berlin Oslo Prague Dublin Lisbon "
            "Boston Cairo Tokyo Milan Chicago New_York"
        ),
    ),
    Relation(
        "P106",
        "profession",
        (
            "{} works as a",
            "By profession, {} is a",
            "The job of {} is that of a",
            "{} earns a living as a",
            "People know {} as a",
            "{} was trained to be a",
        ),
        _words(
            "baker doctor teacher lawyer farmer painter sailor nurse judge carpenter "
            "poet gardener tailor pilot miner fire_fighter"
        ),
    ),
    Relation(
        "P1303",
        "instrument",
        (
            "{} plays the",
            "The instrument of {} is the",
            "In the band, {} is heard on the",
            "{} takes lessons on the",
            "On stage {} performs on the",
            "{} practises every day on the",
        ),
        _words(
            "piano violin guitar flute cello trumpet harp organ clarinet drums "
            "banjo viola lute horn oboe double_bass"
        ),
    ),
    Relation(
        "P27",
        "country of citizenship",
        (
            "{} is a citizen of",
            "The passport of {} was issued by",
            "The nationality of {} is that of",
            "{} votes in the elections of",
            "{} pays taxes in",
            "The home country of {} is",
        ),
        _words(
            "Canada Brazil India China Mexico Norway Chile Egypt Kenya Peru "
            "Japan Portugal Ireland Cuba Austria South_Africa"
        ),
    ),
    Relation(
        "P641",
        "sport",
        (
            "The favourite sport of {} is",
            "{} competes in",
            "In summer {} plays a lot of",
            "{} is a champion of",
            "At the club {} coaches",
            "{} won a medal in",
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
