"""Tasks from WordNet: definitions, subjects, kinds (inference), extraction from definitions, synonyms in sentences."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from downloads import Downloads
from tables import Table
from wordnet import PARTS_OF_SPEECH, SUBJECTS, Synset, WordNet, read_wordnet, whole_word, with_article

ABOUT = "Debian's package wordnet-base (WordNet 3.0, Princeton University)"
LICENCE = "WordNet 3.0 license: use, copy, modify and distribute for any purpose, with its notice"

SUBJECT_NAMES = {"animal": "animal", "plant": "plant", "food": "food", "person": "person", "artifact": "object",
                 "location": "place", "body": "body part", "feeling": "feeling", "time": "time",
                 "substance": "substance"}  # fmt: skip
PER_SUBJECT = 300

DISJOINT = {
    "living": [("mammal", 1), ("bird", 1), ("fish", 1), ("insect", 1), ("reptile", 1), ("amphibian", 3), ("tree", 1),
               ("person", 1), ("arachnid", 1), ("mollusk", 1)],
    "objects": [("vehicle", 1), ("building", 1), ("musical instrument", 1), ("garment", 1), ("weapon", 1),
                ("piece of furniture", 1)],
}  # fmt: skip
"""Nouns with the number of their sense; nothing is of two of them (what WordNet has in two is left out).

A person is a mammal, which WordNet does not say.
"""
PER_GROUP = 150
SENTENCES = (
    "This is {}.",
    "What you see in this picture is {}.",
    "In her dream she was looking at {}.",
    "The riddle's answer is {}.",
    "The largest figure in the painting is {}.",
)
"""Each is of one thing, so that two things of disjoint kinds contradict each other."""
FOLLOWS = set(
    "to of for with at in on by from about as that than into upon over against up down out off away back and or".split()
)
"""After a word, these belong to it: a synonym may need another one."""


HEAD_ENDS = re.compile(
    r"[;:,()]| (that|which|who|whose|of|in|into|for|with|without|used|to|on|at|by|from|having|consisting|not|usually|"
    r"often|made|based|between|where|when|as|about|equal|containing|typically|under|above|below|or|and|given|held) "
)


def make_tables(downloads: Downloads) -> Iterator[Table]:
    """Yield the tables definitions, subjects, kinds, defined_kind, lives and synonyms."""
    wordnet = read_wordnet(downloads.deb("wordnet-base") / "usr" / "share" / "wordnet")
    yield definition_table(wordnet)
    yield subject_table(wordnet)
    yield kind_table(wordnet)
    yield defined_kind_table(wordnet)
    yield life_table(wordnet)
    yield synonym_table(wordnet)


def definition_table(wordnet: WordNet) -> Table:
    """Return common words with the definition of their most frequent sense."""
    table = Table("definitions", unique=("word", "part_of_speech"))
    for synset in wordnet.synsets.values():
        word = synset.words[0]
        if not wordnet.is_tagged(synset, word):
            table.drop("a sense that is rare", word)
        elif not wordnet.is_first(synset, word):
            table.drop("not the most frequent sense of its word", word)
        elif word != word.lower() or synset.instances or not re.fullmatch(r"[a-z][a-z '-]*", word):
            table.drop("a name, or not letters", word)
        elif len(definition := synset.definition) < 10 or whole_word(word).search(definition):
            table.drop("defined by itself, or too short", f"{word}: {definition}")
        else:
            table.add(word=word, part_of_speech=PARTS_OF_SPEECH[synset.key[0]], definition=definition)
    return table


def subject_table(wordnet: WordNet) -> Table:
    """Return nouns and their definitions with the subject under which lexicographers filed them, equally many each."""
    table = Table("subjects", unique=("text",))
    found = defaultdict[str, list[Synset]](list)
    for synset in wordnet.synsets.values():
        subject = SUBJECT_NAMES.get(SUBJECTS.get(synset.subject, ""))
        if synset.key[0] != "n" or subject is None:
            continue
        if len(synset.definition.split()) < 4:
            table.drop("a definition of fewer than four words", synset.definition)
        elif synset.subject in (5, 20) and synset.definition.startswith("type genus"):
            table.drop("a genus", synset.definition)
        else:
            found[subject].append(synset)
    for subject, synsets in found.items():
        for synset in random.Random(3).sample(synsets, min(PER_SUBJECT, len(synsets))):
            table.add(text=f"{synset.words[0]}: {synset.definition}", subject=subject)
    return table


def kind_table(wordnet: WordNet) -> Table:
    """Return inference about kinds of things.

    A poodle is a dog (entailment, by WordNet's hypernyms); a dog may or may not be a poodle (neutral); a poodle is no
    bird (contradiction, from groups of which no synset is in two).
    """
    table = Table("kinds", unique=("premise", "hypothesis"))
    roots = {wordnet.sense(word, number): word for group in DISJOINT.values() for word, number in group}
    near = {word: [w for w, _ in group] for group in DISJOINT.values() for word, _ in group}
    counts = Counter[str]()
    random_ = random.Random(4)
    in_any_order = list(wordnet.synsets.values())
    random_.shuffle(in_any_order)
    for synset in in_any_order:
        if synset.key[0] != "n" or synset.instances:
            continue
        ancestors = wordnet.ancestors(synset.key)
        groups = [roots[key] for key in ancestors if key in roots]
        if not groups or ancestors[next(k for k in ancestors if k in roots)] == 0:
            continue
        word, root = synset.words[0], next(k for k in ancestors if k in roots)
        if len(groups) > 1:
            table.drop("of two groups", f"{word}: {groups}")
        elif not (is_countable(synset) and wordnet.is_first(synset, word) and wordnet.is_tagged(synset, word)):
            table.drop("rare, a name, or not countable", f"{word}: {synset.definition}")
        else:
            inside = [k for k in ancestors if 0 < ancestors[k] <= 3 and root in wordnet.ancestors(k)]
            usable = [k for k in inside if names_its_kind(wordnet, k) and wordnet.synsets[k].words[0] not in word]
            if not usable:
                table.drop("no kind that can be named", word)
                continue
            kind = wordnet.synsets[random_.choice(usable)].words[0]
            counts[groups[0]] += 1
            if counts[groups[0]] > PER_GROUP:
                table.drop("more than enough of its group", word)
                continue
            others = near[groups[0]] if random_.random() < 0.7 else list(near)
            other = random_.choice([w for w in others if w != groups[0] and (groups[0], w) != ("person", "mammal")])
            sentence = random_.choice(SENTENCES)
            for premise, hypothesis, label in (
                (word, kind, "entailment"),
                (kind, word, "neutral"),
                (word, other, "contradiction"),
            ):
                table.add(synset=synset.key, label=label, premise=sentence.format(with_article(premise)),
                          hypothesis=sentence.format(with_article(hypothesis)))  # fmt: skip
    return table


def is_countable(synset: Synset) -> bool:
    """Return True if a noun's definition begins as those of things that can be counted do."""
    word = synset.words[0]
    return (
        bool(re.match(r"(an?|any|one) ", synset.definition))
        and word == word.lower()
        and not word.endswith(("s", "ing"))
    )


def names_its_kind(wordnet: WordNet, key: str) -> bool:
    """Return True if the first word of a synset alone says which kind is meant, and it can be counted."""
    synset = wordnet.synsets[key]
    return is_countable(synset) and wordnet.is_first(synset, synset.words[0])


def defined_kind_table(wordnet: WordNet) -> Table:
    """Return definitions with the words in them that say of which kind the defined thing is."""
    table = Table("defined_kind", unique=("text",))
    for synset in wordnet.synsets.values():
        if synset.key[0] != "n" or synset.instances or not synset.kinds:
            continue
        definition = synset.definition
        names = [w for k in synset.kinds for w in wordnet.synsets[k].words]
        head = HEAD_ENDS.split(definition, maxsplit=1)[0]
        found = [w for w in names if re.search(rf"(?<![\w-]){re.escape(w)}$", head)]
        if not wordnet.is_tagged(synset, synset.words[0]) or not 5 <= len(definition.split()) <= 40:
            table.drop("rare, or of another length", definition)
        elif not found:
            table.drop("the kind is not the first noun of the definition", f"{definition} ({', '.join(names)})")
        else:
            table.add(word=synset.words[0], text=f"{synset.words[0]}: {definition}", kind=max(found, key=len))
    return table


def life_table(wordnet: WordNet) -> Table:
    """Return descriptions of people with years of birth and death, and the profession that is named."""
    table = Table("lives", unique=("text", "what"))
    for synset in wordnet.synsets.values():
        if SUBJECTS.get(synset.subject) != "person" or not synset.instances:
            continue
        years = re.findall(r"\((\d{3,4})-(\d{3,4})\)", synset.definition)
        text = f"{max(synset.words, key=len)}: {synset.definition}"
        if len(years) != 1 or int(years[0][0]) >= int(years[0][1]):
            table.drop("no years of a life, or those of several", text)
            continue
        table.add(text=text, what="the year of birth", answer=years[0][0])
        table.add(text=text, what="the year of death", answer=years[0][1])
        first = re.split(r"[(;,]| (?:who|whose|which|that|and|noted|remembered|of) ", synset.definition, maxsplit=1)[0]
        named = [w for k in synset.instances for w in wordnet.synsets[k].words if whole_word(w).search(first)]
        if len(set(named)) == 1:
            table.add(text=text, what="the profession", answer=named[0])
    return table


def synonym_table(wordnet: WordNet) -> Table:
    """Return WordNet's example sentences with an adjective or adverb replaced by a synonym of the same sense."""
    table = Table("synonyms", unique=("text", "paraphrase"))
    for synset in wordnet.synsets.values():
        words = [w for w in synset.words if wordnet.is_tagged(synset, w)]
        if synset.key[0] not in "ar" or len(words) < 2:  # other verbs and nouns have other forms and idioms
            continue
        for example in synset.examples:
            found = [w for w in words if len(whole_word(w).findall(example)) == 1]
            if len(found) != 1:
                table.drop("the word is inflected, or there more than once", example)
                continue
            other = next((w for w in words if w != found[0] and wordnet.is_first(synset, w)), None)
            if other is None:
                table.drop("no synonym whose most frequent sense it is", example)
                continue
            example = example.replace("`", "'")
            if cause := unfit(example, found[0], other, synset.key[0]):
                table.drop(cause, f"{example} ({found[0]}: {other})")
            else:
                table.add(text=example, paraphrase=whole_word(found[0]).sub(other, example), synset=synset.key)
    return table


def unfit(example: str, word: str, other: str, part: str) -> str | None:
    """Return why a word can't be replaced in a sentence; None if it can.

    Args:
        example: The sentence.
        word: The word in it.
        other: Its synonym.
        part: a (adjective) or r (adverb).
    """
    before, _, after = re.split(f"({whole_word(word).pattern})", example, maxsplit=1)
    if len(example.split()) < 5:
        return "a phrase of fewer than five words"
    if word.lower() in other.lower() or other.lower() in word.lower() or word[:4].lower() == other[:4].lower():
        return "only another spelling"
    if other != other.lower() or "." in other:
        return "a name or an abbreviation"
    following = re.match(r" ([\w']+)", after)
    if following and following[1].lower() in FOLLOWS:
        return "with a preposition"
    if part == "a" and not following:
        return "after the noun"
    if re.search(r"\ban? $", before, re.I) and with_article(word)[:2] != with_article(other)[:2]:
        return "another article"
    return None
