"""WordNet's database files: sets of synonyms, their definitions and examples, and what they are kinds of."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

FILES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
PARTS_OF_SPEECH = {"n": "noun", "v": "verb", "a": "adjective", "r": "adverb"}
SUBJECTS = {
    3: "tops", 4: "act", 5: "animal", 6: "artifact", 8: "body", 9: "cognition", 10: "communication", 11: "event",
    12: "feeling", 13: "food", 14: "group", 15: "location", 18: "person", 19: "phenomenon", 20: "plant",
    21: "possession", 22: "process", 23: "quantity", 26: "state", 27: "substance", 28: "time",
}  # fmt: skip
"""Names of the lexicographers' files that are used here."""


@dataclass(frozen=True)
class Synset:
    """Hold a set of synonyms.

    Attributes:
        key: Part of speech and offset in the file.
        subject: Number of the lexicographers' file.
        words: The synonyms, with spaces.
        kinds: Keys of what it is a kind of.
        instances: Keys of what it is an instance of (Paris: city).
        definition: The gloss up to its first example.
        examples: The sentences and phrases in quotes.
    """

    key: str
    subject: int
    words: tuple[str, ...]
    kinds: tuple[str, ...]
    instances: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]


@dataclass
class WordNet:
    """Hold WordNet, or a part of it.

    Attributes:
        synsets: By key, in the order of the files.
        senses: Keys of a word's synsets, the most frequent first, by part of speech and word in lower case.
        tagged: How many of those occur in a corpus of annotated texts.
    """

    synsets: dict[str, Synset] = field(default_factory=dict)
    senses: dict[str, list[str]] = field(default_factory=dict)
    tagged: dict[str, int] = field(default_factory=dict)

    def is_first(self, synset: Synset, word: str) -> bool:
        """Return True if the synset is the most frequent sense of the word, and of the word as one part of speech."""
        return self.senses.get(f"{synset.key[0]}:{word.lower()}", [""])[0] == synset.key

    def is_tagged(self, synset: Synset, word: str) -> bool:
        """Return True if the word occurs in this sense in the corpus of annotated texts."""
        entry = f"{synset.key[0]}:{word.lower()}"
        return synset.key in self.senses.get(entry, [])[: self.tagged.get(entry, 0)]

    def ancestors(self, key: str) -> dict[str, int]:
        """Return the keys of all that a synset is a kind of, with their distance; its own has 0."""
        found, level, distance = {key: 0}, [key], 0
        while level:
            distance += 1
            level = [k for one in level if one in self.synsets for k in self.synsets[one].kinds if k not in found]
            found |= dict.fromkeys(level, distance)
        return found

    def sense(self, word: str, number: int = 1) -> str:
        """Return the key of a noun's sense, counted from 1."""
        return self.senses[f"n:{word}"][number - 1]


def read_wordnet(folder: Path) -> WordNet:
    """Read the files data.* and index.* of a folder."""
    found = WordNet()
    for letter, name in FILES.items():
        for line in (folder / f"data.{name}").read_text(encoding="utf-8").splitlines():
            if not line.startswith("  "):  # the licence
                synset = read_synset(line)
                found.synsets[synset.key] = synset
        for line in (folder / f"index.{name}").read_text(encoding="utf-8").splitlines():
            if not line.startswith("  "):
                word, _, count, *rest = line.split()
                offsets = rest[-int(count) :]
                entry = f"{letter}:{word.replace('_', ' ')}"
                found.senses[entry] = [letter + offset for offset in offsets]
                found.tagged[entry] = int(rest[-int(count) - 1])
    return found


def read_synset(line: str) -> Synset:
    """Read a line of a data.* file: offset, file number, part of speech, words, pointers, frames, gloss."""
    data, _, gloss = line.partition(" | ")
    fields = data.split()
    letter = "a" if fields[2] == "s" else fields[2]
    count = int(fields[3], 16)
    words = tuple(re.sub(r"\((a|p|ip)\)$", "", w).replace("_", " ") for w in fields[4 : 4 + 2 * count : 2])
    first = 4 + 2 * count
    pointers = [fields[first + 1 + 4 * i : first + 5 + 4 * i] for i in range(int(fields[first]))]
    kinds = tuple(letter + p[1] for p in pointers if p[0] == "@")
    instances = tuple(letter + p[1] for p in pointers if p[0] == "@i")
    definition, examples = read_gloss(gloss)
    return Synset(letter + fields[0], int(fields[1]), words, kinds, instances, definition, examples)


def read_gloss(gloss: str) -> tuple[str, tuple[str, ...]]:
    """Return the definition and the examples of a gloss."""
    examples = tuple(e.strip(" ;") for e in re.findall(r'"([^"]*)"', gloss))
    definition = re.split(r'[;:,]?\s*"', gloss, maxsplit=1)[0]
    return " ".join(definition.split()).strip(" ;"), examples


def whole_word(word: str) -> re.Pattern[str]:
    """Return a pattern that finds a word where it is not a part of another one."""
    return re.compile(rf"(?<![\w-]){re.escape(word)}(?![\w-])")


def with_article(word: str) -> str:
    """Return the word after "a" or "an", by its first letters."""
    sounds_open = re.match(r"[aeiou]", word) and not re.match(r"eu|one\b|uni(?!n)|us[aeiu]|ut[ei]|ufo", word)
    return f"{'an' if sounds_open or re.match(r'h(eir|our|onest|onou?r)', word) else 'a'} {word}"
