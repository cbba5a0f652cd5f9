"""Everyday sentences: a small seeded grammar that gives the embedded model plain English to learn.

`plain_sentence` takes a `random.Random` and returns one sentence ending in a full stop that names
no subject of the world. Templates hold word classes in angle brackets, filled from the same
generator; classes may hold templates in turn. Many templates open with the words that sampled
contexts open with (The, Therefore, Because, I, You), and some mention objects of the world's
relations, so that those words live outside the facts too.
"""

import re
from random import Random

CLASSES: dict[str, tuple[str, ...]] = {
    "person": tuple(
        "man woman boy girl teacher doctor farmer baker neighbour child guest student driver judge "
        "nurse painter tailor sailor pilot stranger king queen grandmother uncle sister".split()
    ),
    "adj": tuple("old young tall quiet kind tired happy clever poor rich brave lonely".split()),
    "beast": tuple("dog cat horse cow bird fox goat sheep duck mouse rabbit donkey".split()),
    "thing": tuple(
        "book letter chair table lamp box bottle key coat hat basket bag clock map picture knife "
        "blanket ladder bell mirror piano violin guitar trumpet".split()
    ),
    "look": tuple("small big red green blue heavy broken new old wooden white strange".split()),
    "food": tuple("bread soup cheese fish rice cake fruit meat honey butter".split()),
    "drink": tuple("milk tea water coffee wine juice".split()),
    "place": tuple(
        "garden kitchen market school church station river bridge forest village house barn "
        "harbour library hotel field shop street castle park".split()
    ),
    "town": tuple("London Paris Rome Vienna Madrid Berlin Oslo Boston Cairo Chicago".split()),
    "land": tuple("Canada Brazil India China Mexico Norway Egypt Japan Ireland".split()),
    "tongue": tuple("French English German Spanish Italian Russian Greek".split()),
    "game": tuple("tennis football golf chess hockey cricket".split()),
    "time": tuple(
        "in the morning, in the evening, at night, after dinner, before noon, on Sunday, "
        "on Monday, last week, last winter, every spring".split(", ")
    ),
    "where": ("in the <place>", "near the <place>", "behind the <place>", "at the <place>"),
    "who": ("the <person>", "the <adj> <person>", "my <person>", "your <person>", "a <person>"),
    "what": ("the <thing>", "the <look> <thing>", "a <look> <thing>", "my <thing>"),
    "did": tuple(
        "found <what> <where>, sold <what> to <who>, bought <food> <where>, walked to the <place>, "
        "waited <where>, gave <what> to <who>, carried <what> into the <place>, "
        "drank <drink> with <who>, ate <food> and <food>, fed the <beast> <time>, "
        "talked about <game> <time>, took the train to <town>, travelled to <land>, "
        "read a book about <land>, learned <tongue> <where>, lost <what> <time>, "
        "cleaned the <place>, slept <time>".split(", ")
    ),
    "state": tuple(
        "was very <adj>, was <adj> and <adj>, was not <where>, had no <food>, "
        "had a <look> <thing>, wanted some <drink>, liked the <beast>".split(", ")
    ),
    "sky": ("it rained", "it was cold", "it was late", "the sun was warm", "it snowed"),
    "can": tuple(
        "open <what>, wait <where>, see the <place> from here, buy <food> <where>, "
        "play <game> <where>, help <who>, drink <drink> <time>, "
        "speak <tongue> with <who>".split(", ")
    ),
}

TEMPLATES = (
    "The <person> <did>.",
    "The <adj> <person> <did>.",
    "The <person> <state>.",
    "The <beast> slept <where>.",
    "The <beast> ran to the <place> <time>.",
    "The <thing> <where> is <look>.",
    "The <place> is open <time>.",
    "The train from <town> to <town> was late.",
    "Therefore <who> <did>.",
    "Therefore, <who> <state>.",
    "Therefore the <beast> stayed <where>.",
    "Because <sky>, <who> <did>.",
    "Because <who> <state>, <who> <did>.",
    "Because the <place> was closed, <who> <did>.",
    "I saw <who> <where>.",
    "I think that <who> <state>.",
    "I <did>.",
    "I like <food> and <drink>.",
    "You can <can>.",
    "You should <can>.",
    "You must not <can>.",
    "You saw <what> <where>.",
    "A <look> <thing> lay <where>.",
    "A <beast> stood <where>.",
    "<Time>, <who> <did>.",
    "When <sky>, <who> <did>.",
    "In <town>, <who> <did>.",
    "He <did>.",
    "She <did> and <did>.",
    "They play <game> <time>.",
    "We <did> because <sky>.",
    "My <person> speaks <tongue> and <tongue>.",
    "If you <can>, <who> will be <adj>.",
    "There is <food> <where>.",
    "Many people in <land> speak <tongue>.",
    "Nobody knew why <who> <did>.",
)

_SLOT = re.compile(r"<([A-Za-z]+)>")


def plain_sentence(random: Random) -> str:
    """Draw one plain sentence, the same for the same state of the generator, which moves on.

    It has an upper-case first letter and a full stop at its end.
    """
    text = random.choice(TEMPLATES)
    while slot := _SLOT.search(text):
        word = random.choice(CLASSES[slot[1].lower()])
        if slot[1][0].isupper():
            word = word[0].upper() + word[1:]
        text = text[: slot.start()] + word + text[slot.end() :]
    return text
