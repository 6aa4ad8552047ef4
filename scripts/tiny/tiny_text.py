"""Text of the tiny offline assets: word lists, a small sentence grammar, two-line stories and made-up words.

Everything here is written for this project. Each topic has its own people, actions, things and places, and a sentence
stays inside one topic, so that even a small model can learn which words go together. All generators draw from a given
`random.Random`, so the same seed gives the same text.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

Token = tuple[str, str]  # (tag, words)


@dataclass(frozen=True)
class Speaker:
    """An espeak-ng voice: accent plus variant, pitch 0..99, speed in words a minute."""

    name: str
    voice: str
    pitch: int
    speed: int


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


@dataclass(frozen=True)
class Topic:
    """Words of one topic: people, past-tense transitive verbs, countable things, their adjectives, "prep place"."""

    agents: tuple[str, ...]
    verbs: tuple[str, ...]
    objects: tuple[str, ...]
    adjectives: tuple[str, ...]
    places: tuple[tuple[str, str], ...]


def _topic(line: str) -> Topic:
    """Parses "agents | verbs | objects | adjectives | preposition place ..."."""
    agents, verbs, objects, adjectives, places = (tuple(part.split()) for part in line.split("|"))
    return Topic(agents, verbs, objects, adjectives, tuple(zip(places[::2], places[1::2], strict=True)))


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
TOPICS = [_topic(line) for line in _TABLE.strip().splitlines()]
PERSON_ADJECTIVES = (
    "careful",
    "cheerful",
    "clever",
    "curious",
    "friendly",
    "gentle",
    "nervous",
    "patient",
    "sleepy",
    "tired",
)
NAMES = ("Amanda", "Benjamin", "Camilla", "Dominic", "Helena", "Martin", "Nicola", "Oliver")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TIMES = ("yesterday", "last summer", "after dinner", "every morning", "before midnight", "on Saturday")
# Wrong order of a basic sentence's seven tokens, by kind.
WRONG_ORDERS = {"determiner_noun": (1, 2, 0, 3, 4, 5, 6), "adjective_noun": (0, 2, 1, 3, 4, 5, 6)}
WRONG_ORDERS |= {"verb_object": (0, 1, 2, 4, 3, 5, 6), "preposition_place": (0, 1, 2, 3, 4, 6, 5)}
SYNTACTIC_TYPES = tuple(WRONG_ORDERS)


def article(word: str) -> str:
    """The indefinite article in front of `word`."""
    return "an" if word[0] in "aeiou" else "a"


def render(tokens: list[Token]) -> str:
    """Joins tagged tokens into a sentence with a capital letter and a full stop."""
    text = " ".join(words for _, words in tokens)
    return text[0].upper() + text[1:] + "."


def words_of(text: str) -> list[str]:
    """Lower-case words of a text, without punctuation."""
    return re.findall(r"[a-z]+", text.lower())


@dataclass
class SentenceMaker:
    """Draws sentences that have not been drawn before; `seen` is shared by corpus and benchmarks."""

    rng: random.Random
    seen: set[str] = field(default_factory=set)

    def _new(self, draw) -> list[Token]:
        """Calls `draw` until it gives an unseen sentence."""
        while True:
            tokens = draw()
            text = render(tokens)
            if text not in self.seen:
                self.seen.add(text)
                return tokens

    def plain(self) -> list[Token]:
        """The basic sentence: the ADJ AGENT VERB the ADJ OBJECT PREP the PLACE."""

        def draw() -> list[Token]:
            rng, topic = self.rng, self.rng.choice(TOPICS)
            preposition, place = rng.choice(topic.places)
            return [
                ("det", "the"),
                ("adj", rng.choice(PERSON_ADJECTIVES)),
                ("agent", rng.choice(topic.agents)),
                ("verb", rng.choice(topic.verbs)),
                ("object", f"the {rng.choice(topic.adjectives)} {rng.choice(topic.objects)}"),
                ("prep", preposition),
                ("place", f"the {place}"),
            ]

        return self._new(draw)

    def varied(self) -> list[Token]:
        """One of five other sentence shapes, as a single-tag token list."""

        def draw() -> list[Token]:
            rng, topic = self.rng, self.rng.choice(TOPICS)
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
            return [("clause", rng.choice(shapes))]

        return self._new(draw)

    def corpus(self) -> str:
        """A corpus sentence: half of them basic, half of other shapes."""
        return render(self.plain() if self.rng.random() < 0.5 else self.varied())

    def halves(self) -> tuple[str, str]:
        """A new basic sentence cut after its verb."""
        tokens = self.plain()
        first = render(tokens[:4])[:-1]
        return first, " ".join(words for _, words in tokens[4:]) + "."

    def order_pair(self, kind: str) -> tuple[str, str]:
        """A new basic sentence and the same words in a wrong order (see WRONG_ORDERS)."""
        tokens = self.plain()
        return render(tokens), render([tokens[i] for i in WRONG_ORDERS[kind]])

    def story(self) -> tuple[str, str, str]:
        """A story of two sentences, an ending inside its topic, and an ending from another topic."""
        while True:
            rng = self.rng
            topic = rng.choice(TOPICS)
            agent = rng.choice(topic.agents)
            thing, other, third = rng.sample(topic.objects, 3)
            verb, verb2, verb3 = rng.sample(topic.verbs, 3)
            adjective = rng.choice(topic.adjectives)
            story = (
                f"The {agent} {verb} the {thing}. Then the {agent} {verb2} {article(adjective)} {adjective} {other}."
            )
            if story in self.seen:
                continue
            self.seen.add(story)
            away = rng.choice([other_topic for other_topic in TOPICS if other_topic is not topic])
            unrelated = f"In the end, the {rng.choice(away.agents)} {rng.choice(away.verbs)} "
            unrelated += f"the {rng.choice(away.objects)}."
            return story, f"In the end, the {agent} {verb3} the {third}.", unrelated


def syllables(word: str) -> int:
    """Rough syllable count: vowel groups, less a silent final e or ed."""
    stem = re.sub(r"(?<=[^aeioutdl])ed$", "", word)
    stem = re.sub(r"(?<=[^aeioul])e$", "", stem)
    return len(re.findall(r"[aeiouy]+", stem))


# Non-words that happen to be real words or names, or sound like one.
BANNED = {"ravage", "emory", "ganger", "calious", "neager", "clozer", "gudger", "softed", "tinger", "parkit", "goble"}
BANNED |= {"mormer", "nasty", "vested", "middle", "copious", "gitler", "sodger", "minger", "linger", "bitter", "warden"}


def _changeable(word: str) -> list[int]:
    """Positions where a letter can change and the word stays pronounceable: single vowels and single consonants."""
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
    """A pronounceable made-up word that differs from `word` in exactly two letters, or None if there is no room.

    Vowels become vowels and consonants become consonants, so the made-up word keeps the shape and length of the word.
    """
    # The ending carries inflection (watered, painted): changing it would mark the non-word by form alone.
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


# Filled in by `str.format`; sizes are in MB.
README = """# Tiny offline assets

A small stand-in for the full data, codec and base model: enough to run encoding, training, evaluation and generation
on a laptop without a network. Scores on it say whether the code works, not how good a full model is.

    {command}

builds the folder again from fixed seeds (`espeak-ng` must be installed). Built with
{versions}.

| part | what | size |
|---|---|---|
| `corpus/` | {train_clips} training clips ({train_minutes:.1f} min, 4 shards) and {validation_clips} validation clips \
({validation_minutes:.1f} min, other sentences) | {corpus:.1f} MB |
| `words/` | the ten digits said alone, {words} clips a take: {takes} takes for training, one held out \
| {words_mb:.1f} MB |
| `mimi/` | codec in the Mimi architecture, 24 kHz, 12.5 frames/s, 8 levels of 256 codes, trained on `corpus/` by \
`scripts/tiny/train_tiny_codec.py`: how in `mimi/training.json`, how good in `mimi/README.md` | {mimi:.1f} MB |
| `recogniser/` `speaker_encoder/` | `Wav2Vec2ForCTC` and `WavLMForXVector` that know words and voices of `corpus/`, \
trained on it by `scripts/tiny/train_tiny_listeners.py`: how well they hear in `recogniser/README.md` \
| {recogniser:.1f} + {speaker_encoder:.1f} MB |
| `llama/` | Llama configuration without weights, byte-level BPE tokenizer of 512 entries | {llama:.2f} MB |
| `benchmarks/` | SALMon speaker consistency ({speaker_pairs} pairs), sLM21 lexical and syntactic, StoryCloze \
({pairs} pairs each) | {benchmarks:.1f} MB |
| `prompt.wav` | the beginning of a sentence that is in no other part, 16-bit PCM, 24 kHz | {prompt:.2f} MB |

Clips are Ogg Opus, 24 kHz mono, about 22 kbit/s (StoryCloze 16). Corpus columns: `id`, `audio` (bytes, path),
`text`, `speaker`, `duration` in seconds.

The two clips of a speaker-consistency or StoryCloze pair share their opening before compression; Opus may code it a
little differently in the two files. The negative of a StoryCloze pair has an ending from another topic. `frequency` in
`sLM21/lexical/dev/gold.csv` counts the word (for a non-word, its partner) in the training text.

## Speakers

| name | espeak-ng voice | pitch (`-p`) | words/min (`-s`) |
|---|---|---|---|
{voices}

## Licence

Speech synthesised with espeak-ng; the text was written for this project. Distributed under the project's BSD-3-Clause
licence.
"""
