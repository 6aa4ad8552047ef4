"""Text for the tiny offline assets: word lists, a small grammar, stories and non-words.

All text was written for this project. Each topic has its own people, actions, things and places. A sentence has one
topic, so that a small model can learn which words occur together. The same seed gives the same text.
"""

import random
import re
from collections.abc import Callable
from typing import NamedTuple


class Speaker(NamedTuple):
    """An espeak-ng voice."""

    name: str
    voice: str  # accent and variant
    pitch: int  # 0 to 99
    speed: int  # words per minute


SPEAKERS = (
    Speaker("low_slow_man", "en-us+m3", 15, 150),
    Speaker("plain_man", "en-gb+m7", 45, 175),
    Speaker("old_scot", "en-gb-scotland+croak", 30, 165),
    Speaker("quick_high_man", "en-029+m4", 80, 200),
    Speaker("plain_woman", "en-us+f2", 55, 165),
    Speaker("formal_woman", "en-gb-x-rp+f4", 80, 185),
    Speaker("deep_slow_woman", "en-gb-x-gbclan+f5", 20, 150),
    Speaker("high_quick_woman", "en-gb-x-gbcwmd+f1", 99, 200),
)
NEW_VOICE = Speaker("new_woman", "en-us+belinda", 50, 170)  # not in the corpus


class Topic(NamedTuple):
    """Words of one topic."""

    agents: list[str]
    verbs: list[str]  # in the past tense
    objects: list[str]
    adjectives: list[str]
    places: list[tuple[str, str]]  # preposition and noun


_TABLE = """
farmer shepherd gardener | watered planted gathered measured | pumpkin carrot cabbage tomato | \
yellow ripened muddy | in meadow beside stable behind orchard
baker waiter butler | tasted buttered sweetened covered | pudding biscuit pancake sandwich | \
salty golden creamy | in kitchen beside oven near cupboard
sailor captain fisherman | anchored steered lifted tested | lobster paddle lantern rowboat | \
silver slippery floating | in harbour near island beside river
teacher student professor | corrected explained collected borrowed | notebook pencil lesson dictionary | \
simple difficult printed | in library behind classroom near corridor
singer drummer conductor | tuned practised repeated admired | melody trumpet violin piano | \
lovely musical solemn | in theatre behind curtain near ballroom
carpenter builder mechanic | hammered painted polished mended | cabinet table engine bicycle | \
wooden rusty heavy | in workshop behind garage near warehouse
doctor dentist surgeon | bandaged examined comforted treated | finger shoulder elbow stomach | \
painful swollen tender | in hospital near pharmacy beside ambulance
hunter ranger camper | followed discovered captured startled | rabbit beaver squirrel badger | \
timid spotted furry | in forest beside waterfall behind mountain
merchant tailor customer | purchased delivered wrapped ordered | blanket jacket necklace umbrella | \
expensive woollen purple | in market near village beside fountain
pilot scientist astronaut | observed recorded inspected reported | planet comet rocket satellite | \
distant glowing enormous | in desert behind antenna near telescope
"""
TOPICS = []
for line in _TABLE.strip().splitlines():
    _agents, _verbs, _objects, _adjectives, _places = (part.split() for part in line.split("|"))
    _pairs = list(zip(_places[::2], _places[1::2], strict=True))
    TOPICS.append(Topic(_agents, _verbs, _objects, _adjectives, _pairs))
PERSON_ADJECTIVES = "careful cheerful clever curious friendly gentle nervous patient sleepy tired".split()
NAMES = ("Amanda", "Benjamin", "Camilla", "Dominic", "Helena", "Martin", "Nicola", "Oliver")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TIMES = ("yesterday", "last summer", "after dinner", "every morning", "before midnight", "on Saturday")
# Wrong orders of the seven parts of a basic sentence, by kind.
WRONG_ORDERS = {"determiner_noun": (1, 2, 0, 3, 4, 5, 6), "adjective_noun": (0, 2, 1, 3, 4, 5, 6)}
WRONG_ORDERS |= {"verb_object": (0, 1, 2, 4, 3, 5, 6), "preposition_place": (0, 1, 2, 3, 4, 6, 5)}
SYNTACTIC_TYPES = tuple(WRONG_ORDERS)


def article(word: str) -> str:
    """Return the indefinite article for a word."""
    return "an" if word[0] in "aeiou" else "a"


def render(words: list[str]) -> str:
    """Join words into a sentence with a capital letter and a full stop."""
    text = " ".join(words)
    return text[0].upper() + text[1:] + "."


class SentenceMaker:
    """Generator of sentences for the corpus and the benchmarks. A sentence is never repeated."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.seen: set[str] = set()

    def _new(self, draw: Callable[[random.Random, Topic], list[str]]) -> list[str]:
        """Draw sentences until a sentence is new; return the parts of this sentence."""
        while True:
            words = draw(self.rng, self.rng.choice(TOPICS))
            text = render(words)
            if text not in self.seen:
                self.seen.add(text)
                return words

    def plain(self) -> list[str]:
        """Return the seven parts of a basic sentence: "the", ADJ, AGENT, VERB, "the ADJ OBJECT", PREP, "the PLACE"."""
        return self._new(_plain)

    def corpus(self) -> str:
        """Return a sentence for the corpus. With a probability of 0.5, it is a basic sentence."""
        return render(self.plain() if self.rng.random() < 0.5 else self._new(_varied))

    def halves(self) -> tuple[str, str]:
        """Cut a new basic sentence after the verb, and return the two halves."""
        words = self.plain()
        return render(words[:4])[:-1], " ".join(words[4:]) + "."

    def fronted(self) -> str:
        """Return a new sentence that begins with a place and a comma, such as "In the meadow, the shepherd ..."."""
        while "," not in (sentence := render(self._new(_varied))):
            pass
        return sentence

    def order_pair(self, kind: str) -> tuple[str, str]:
        """Return a new basic sentence, and the same words in the wrong order ``WRONG_ORDERS[kind]``."""
        words = self.plain()
        return render(words), render([words[i] for i in WRONG_ORDERS[kind]])

    def story(self) -> tuple[str, str, str]:
        """Return a story of two sentences, an ending with the same topic, and an ending with another topic."""
        while True:
            rng = self.rng
            topic = rng.choice(TOPICS)
            agent = rng.choice(topic.agents)
            thing, other, third = rng.sample(topic.objects, 3)
            verb, verb2, verb3 = rng.sample(topic.verbs, 3)
            adjective = rng.choice(topic.adjectives)
            story = f"The {agent} {verb} the {thing}. Then the {agent} {verb2} "
            story += f"{article(adjective)} {adjective} {other}."
            if story in self.seen:
                continue
            self.seen.add(story)
            away = rng.choice([other_topic for other_topic in TOPICS if other_topic is not topic])
            words = rng.choice(away.agents), rng.choice(away.verbs), rng.choice(away.objects)
            unrelated = "In the end, the {} {} the {}.".format(*words)
            return story, f"In the end, the {agent} {verb3} the {third}.", unrelated


def _plain(rng: random.Random, topic: Topic) -> list[str]:
    preposition, place = rng.choice(topic.places)
    words = [rng.choice(choices) for choices in (PERSON_ADJECTIVES, topic.agents, topic.verbs)]
    thing = f"the {rng.choice(topic.adjectives)} {rng.choice(topic.objects)}"
    return ["the", *words, thing, preposition, f"the {place}"]


def _varied(rng: random.Random, topic: Topic) -> list[str]:
    """Draw a sentence in one of five forms that differ from a basic sentence; return the sentence as a single part."""
    first, second = rng.sample(topic.agents, 2)
    thing, other = rng.sample(topic.objects, 2)
    verb, verb2 = rng.sample(topic.verbs, 2)
    adjective, adjective2 = rng.sample(topic.adjectives, 2)
    preposition, place = rng.choice(topic.places)
    shapes = (
        f"{rng.choice(NAMES)} and the {first} {verb} the {thing} {rng.choice(TIMES)}",
        f"{preposition} the {place}, the {first} {verb} {article(adjective)} {adjective} {thing}",
        f"the {first} and the {second} {verb} the {adjective} {thing} {rng.choice(TIMES)}",
        f"the {thing} {preposition} the {place} was {adjective} and {adjective2}",
        f"the {first} {verb} the {thing}. Then the {first} {verb2} the {other}",
    )
    return [rng.choice(shapes)]


def syllables(word: str) -> int:
    """Estimate the number of syllables: count the groups of vowels, and ignore a silent "e" or "ed" at the end."""
    stem = re.sub(r"(?<=[^aeioutdl])ed$", "", word)
    stem = re.sub(r"(?<=[^aeioul])e$", "", stem)
    return len(re.findall(r"[aeiouy]+", stem))


# `non_word` must not return these strings, because they are, or sound like, real words or names.
BANNED = {"ravage", "emory", "ganger", "calious", "neager", "clozer", "gudger", "softed", "tinger", "parkit", "goble"}
BANNED |= {"mormer", "nasty", "vested", "middle", "copious", "gitler", "sodger", "minger", "linger", "bitter", "warden"}


def _changeable(word: str) -> list[int]:
    """Return the positions of vowels and consonants that can be replaced while the word stays pronounceable."""
    vowels = "aeiouy"
    places = []
    for i, letter in enumerate(word):
        before = word[i - 1] if i else ""
        after = word[i + 1] if i + 1 < len(word) else ""
        lone_vowel = letter in "aeiou" and before and after and before not in vowels and after not in vowels + "w"
        onset = letter in "bdfgklmnprstvz" and after and after in vowels and (not before or before in vowels)
        if lone_vowel or onset:
            places.append(i)
    return places


def non_word(word: str, rng: random.Random, vocabulary: set[str]) -> str | None:
    """Change two letters of a word; return the pronounceable non-word, or None if all attempts fail."""
    # Keep the ending of a word like "painted", because a changed ending would reveal the non-word.
    limit = len(word) - 2 if word.endswith(("ed", "er", "or")) else len(word)
    places = [i for i in _changeable(word) if i < limit]
    if len(places) < 2:
        return None
    for _ in range(50):
        letters = list(word)
        for i in rng.sample(places, 2):
            pool = "aeiou" if letters[i] in "aeiou" else "bdfgklmnprstvz"
            letters[i] = rng.choice([letter for letter in pool if letter != letters[i]])
        made = "".join(letters)
        if made not in vocabulary and made not in BANNED:
            return made
    return None
