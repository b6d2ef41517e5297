"""The converters of examples/data on small excerpts: which rows they make, and what they drop for which reason."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "data"
sys.path.insert(0, str(EXAMPLES))

import countries  # noqa: E402
import dictionary  # noqa: E402
import packages  # noqa: E402
import place_names  # noqa: E402
import puzzles  # noqa: E402
import reviews  # noqa: E402
import translated_messages  # noqa: E402
import wordnet  # noqa: E402
from tables import Table  # noqa: E402


def rows_of(table: Table, *columns: str) -> list[Any]:
    """Return the cells of some columns, after a check that the task files name columns that the table has."""
    text = None if table.tasks is not None else (EXAMPLES / "tasks" / f"{table.name}.yaml").read_text()
    tasks: Any = table.tasks if text is None else yaml.safe_load(text)
    for task in tasks if isinstance(tasks, list) else [tasks]:
        source = task["data"] if isinstance(task["data"], str) else task["data"]["source"]
        assert source == table.file
        templates = [
            *task["fields"].values(),
            task["output"],
            task.get("rationale", ""),
            f"{{{task.get('group', '')}}}",
        ]
        named = set(re.findall(r"\{(\w+)\}", "".join(templates))) - {"label" if table.tsv else ""}
        assert all(named <= row.keys() for row in table.rows), (named, table.rows[:1])
    return [row[columns[0]] if len(columns) == 1 else tuple(row[c] for c in columns) for row in table.rows]


def test_reviews_have_the_mean_of_their_ratings() -> None:
    texts = "1\t2.0\tTea &amp;amp; cake, lovely\r\n2\t-1.0\tbad mean here\r\n3\t0.5\t...\r\n4\t1\tnobody rated it\r\n"
    ratings = '\ufeff1\t2\t1.0\t[1, 3]\n2\t-1\t0\t"[1, 1]"\n3\t0.5\t0\t[0, 1]\n'.replace("\ufeff", "")
    table = reviews.review_table("tweets", texts, ratings)
    assert rows_of(table, "text", "mean_rating", "std") == [("Tea & cake, lovely", "2.0000", "1.0000")]
    assert table.dropped == {"the published mean is not that of the ratings": 1, "no words": 1, "no ratings": 1}


PO = r"""
msgid ""
msgstr "Content-Type: text/plain; charset=UTF-8\n"

msgid "Save and "
"continue editing"
msgstr "Sichern und weiter \"bearbeiten\""

#, fuzzy, python-format
msgid "Delete %(name)s"
msgstr "Sichern"

#, python-format
msgid "Hello %(name)s, welcome"
msgstr "Hallo %(nam)s, willkommen"

msgid "%d file"
msgid_plural "%d files"
msgstr[0] "%d Datei"
msgstr[1] "%d Dateien"

msgctxt "abbrev. month"
msgid "March"
msgstr "Mär"

msgid "N j, Y"
msgstr "j. N Y"

msgid "Not done yet"
msgstr ""

msgid "Server"
msgstr "Server"

#~ msgid "Old message"
#~ msgstr "Alte Nachricht"

msgid "Order"
msgstr "Reihenfolge"
"""


def test_messages_of_po_files(tmp_path: Path) -> None:
    for app, text in (("admin", PO), ("shop", 'msgid "Order"\nmsgstr "Bestellung"\n')):
        folder = tmp_path / app / "locale" / "de" / "LC_MESSAGES"
        folder.mkdir(parents=True)
        (folder / "django.po").write_text(text)
    more = "".join(f'\n\nmsgid "Number {i} of all"\nmsgstr "Nummer {i} von allen"' for i in range(100))
    (folder / "djangojs.po").write_text(more)
    (table,) = translated_messages.read_pairs(tmp_path).values()
    found = rows_of(table, "english", "translation")
    assert found[0] == ("Save and continue editing", 'Sichern und weiter "bearbeiten"') and len(found) == 101
    assert table.dropped == {
        "marked as fuzzy": 1,
        "other placeholders than the message": 1,
        "plural forms": 1,
        "an abbreviation or a name of a month in context": 1,
        "a format, not words": 1,
        "not translated": 1,
        "left as the message is": 1,
        "translated in two ways": 1,
    }


def test_two_translations_are_paraphrases_and_languages_are_told_apart() -> None:
    one = {"a": "Elija el archivo que desea", "b": "Guardar todos los cambios", "c": "Borrar", "d": "Sólo en un país"}
    other = {"a": "Seleccione el archivo deseado", "b": "guardar todos los cambios.", "c": "Eliminar"}
    table = translated_messages.paraphrase_table("es", [one, other])
    assert rows_of(table, "text", "paraphrase") == [("Elija el archivo que desea", "Seleccione el archivo deseado")]
    assert table.dropped == {"equal but for case and punctuation": 1, "shorter than four words": 1}
    pairs = {
        "es": {
            "one": "El archivo que desea guardar",
            "two": "Una frase que es igual en dos",
            "%s": "El archivo %s no existe",
        },
        "gl": {"one": "O ficheiro que quere gardar"},
        "pt": {"two": "Uma frase que é igual em dois", "three": "Una frase que es igual en dos"},
    }
    table = translated_messages.language_table(pairs)
    expected = {"El archivo que desea guardar": "Spanish", "Uma frase que é igual em dois": "Portuguese"}
    assert dict(rows_of(table, "text", "language")) == expected  # Galician is too close to tell apart


PACKAGES = """Package: 0game
Version: 1.2-3
Section: games
Homepage: https://0game.example/
Architecture: amd64
Size: 100
Description: strategy game
Description-md5: aaa

Package: 0game-data
Source: 0game (1.2)
Version: 1.2-3
Section: games
Description-md5: bbb

Package: old
Section: games
Description-md5: ccc
"""
LONG = """ Build an empire, lead armies in real time strategy (RTS) battles, and trade with
 neighbours on land and sea in four centuries of history.
 .
 Features:
  * many maps,
    large and small
  * an editor
 Some are free.
 .
 It runs on slow machines, and it needs no network at all for a game against
 the computer, which has five levels."""
ENGLISH = f"""Package: 0game
Description-md5: aaa
Description-en: free game of ancient wars
{LONG}

Package: 0game-data
Description-md5: bbb
Description-en: free game of ancient wars (data)
{LONG}

Package: old
Description-md5: of another version
Description-en: does not belong to this version
{LONG}
"""
GERMAN = """Package: 0game
Description-md5: aaa
Description-de: freies Spiel über antike Kriege
 Errichten Sie ein Reich, führen Sie Armeen in Schlachten in Echtzeit und handeln Sie mit
 Nachbarn zu Lande und zu Wasser in vier Jahrhunderten der Geschichte.
 .
 Merkmale:
 .
 Es läuft auf langsamen Rechnern.
"""


def read_debian(tmp_path: Path) -> tuple[Any, Any, Any]:
    for name, text in (("Packages", PACKAGES), ("Translation-en", ENGLISH), ("Translation-de", GERMAN)):
        (tmp_path / f"deb_main_{name}").write_text(text)
    lists = sorted(tmp_path.iterdir())
    found = packages.read_packages(lists)
    return found, *(packages.read_translations(lists, language, found) for language in ("en", "de"))


def test_package_descriptions(tmp_path: Path) -> None:
    found, english, german = read_debian(tmp_path)
    assert list(english) == ["0game", "0game-data"]  # a description of another version is no description of this one
    table = packages.synopsis_table("synopses", english, found)
    ((text, synopsis),) = rows_of(table, "text", "synopsis")
    assert synopsis == "free game of ancient wars" and table.dropped == {"another package of the same source": 1}
    first, features, last = text.split("\n\n")
    assert first.endswith("trade with neighbours on land and sea in four centuries of history.")
    assert features == "Features:\n* many maps, large and small\n* an editor\nSome are free." and last.startswith(
        "It runs on slow"
    )
    pairs = rows_of(packages.translation_table(english, german, found), "english", "german")
    assert pairs[0] == ("free game of ancient wars", "freies Spiel über antike Kriege")
    assert pairs[1][0] == first and pairs[1][1].startswith("Errichten Sie ein Reich")
    assert rows_of(packages.section_table(english, found), "section") == ["games"]
    with pytest.raises(packages.FetchError, match="no descriptions in the language fr"):
        packages.read_translations(sorted(tmp_path.iterdir()), "fr", found)


def test_what_is_extracted_stands_in_the_text(tmp_path: Path) -> None:
    found, english, _ = read_debian(tmp_path)
    table = packages.acronym_table(english)
    assert rows_of(table, "acronym", "answer") == [("RTS", "real time strategy")]
    ((text, what, answer),) = rows_of(packages.record_table(found, english), "text", "what", "answer")
    assert (what, answer) == ("the version", "1.2-3") and "\nVersion: 1.2-3\n" in text
    assert packages.stands_for("GPL", "under the General Public License") == "General Public License"
    for acronym, before in (("PS", "print PostScript"), ("API", "an interface"), ("SQL", "Some query. Language")):
        assert packages.stands_for(acronym, before) is None


PEOPLE = ("paint", "bak", "heal", "sing", "danc", "teach", "build", "farm")
NOUNS = [  # offset, lexicographers' file, words, pointers, gloss
    ("00000001", "03", ["person"], [], "a human being"),
    ("00000002", "03", ["mammal"], [], "a warm-blooded animal"),
    ("00000003", "03", ["bird"], [], "a warm-blooded animal that lays eggs"),
    ("00000004", "05", ["dog", "domestic_dog"], ["@ 00000002"], 'a tame mammal that barks; "the dog slept on a rug"'),
    ("00000005", "05", ["terrier"], ["@ 00000004"], "a small dog that digs"),
    ("00000006", "05", ["Fido"], ["@i 00000005"], "the first terrier"),
    ("00000007", "18", ["poet"], ["@ 00000001"], "a writer of verse"),
    ("00000008", "18", ["Doe", "Jane_Doe"], ["@i 00000007"], "English poet who met a general (1801-1850)"),
    ("00000009", "18", ["Roe", "Rita_Roe"], ["@i 00000007"], "friend of Doe (1801-1850) and others (1900-1901)"),
    *((f"{i:08d}", "18", [f"{name}er"], ["@ 00000001"], f"a person who {name}s") for i, name in enumerate(PEOPLE, 10)),
]  # fmt: skip


def small_wordnet(tmp_path: Path) -> wordnet.WordNet:
    for name in wordnet.FILES.values():
        (tmp_path / f"data.{name}").write_text("  1 a licence\n")
        (tmp_path / f"index.{name}").write_text("  1 a licence\n")
    lines, index = [], []
    for offset, subject, words, pointers, gloss in NOUNS:
        shown = "".join(f"{p} n 0000 " for p in pointers)
        names = " ".join(f"{word} 0" for word in words)
        lines.append(f"{offset} {subject} n {len(words):02x} {names} {len(pointers):03d} {shown}| {gloss}  ")
        index += [f"{word.lower()} n 1 1 @ 1 1 {offset}  " for word in words]
    (tmp_path / "data.noun").write_text("\n".join(lines))
    (tmp_path / "index.noun").write_text("\n".join(sorted(index)))
    return wordnet.read_wordnet(tmp_path)


def test_wordnet_is_read_and_its_kinds_make_sound_inference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = small_wordnet(tmp_path)
    dog = found.synsets["n00000004"]
    assert dog.words == ("dog", "domestic dog") and dog.definition == "a tame mammal that barks"
    assert dog.examples == ("the dog slept on a rug",) and found.ancestors(dog.key)["n00000002"] == 1
    groups = {"living": [("mammal", 1), ("bird", 1), ("person", 1)]}
    monkeypatch.setattr(dictionary, "DISJOINT", groups)
    labels = rows_of(dictionary.kind_table(found), "premise", "hypothesis", "label")
    for premise, hypothesis, label in labels:
        one, other = (re.search(r"an? (\w+)\.$", text)[1] for text in (premise, hypothesis))  # type: ignore[index]
        above = {
            "terrier": ["dog", "mammal"],
            "dog": ["mammal"],
            "poet": ["person"],
            **{f"{name}er": ["person"] for name in PEOPLE},
        }
        assert label == (
            "entailment"
            if other in above.get(one, [])
            else "neutral"
            if one in above.get(other, [])
            else "contradiction"
        ), (premise, hypothesis)
    assert {label for *_, label in labels} == {"entailment", "neutral", "contradiction"}
    assert not any(
        "er." in premise and "terrier" not in premise and "mammal" in hypothesis for premise, hypothesis, _ in labels
    )
    monkeypatch.setattr(dictionary, "DISJOINT", {"living": [("mammal", 1), ("dog", 1), ("bird", 1)]})
    assert dictionary.kind_table(found).dropped["of two groups"] == 1  # a terrier is both: they are not disjoint


def test_tables_of_the_dictionary(tmp_path: Path) -> None:
    found = small_wordnet(tmp_path)
    lives = rows_of(dictionary.life_table(found), "text", "what", "answer")
    text = "Jane Doe: English poet who met a general (1801-1850)"
    assert lives == [
        (text, "the year of birth", "1801"),
        (text, "the year of death", "1850"),
        (text, "the profession", "poet"),
    ]
    assert ("poet", "noun", "a writer of verse") in rows_of(
        dictionary.definition_table(found), "word", "part_of_speech", "definition"
    )
    assert ("dog", "mammal") in rows_of(dictionary.defined_kind_table(found), "word", "kind")
    assert ("terrier: a small dog that digs", "animal") in rows_of(dictionary.subject_table(found), "text", "subject")
    assert not dictionary.synonym_table(found).rows  # nouns have idioms


@pytest.mark.parametrize(
    ("example", "word", "other", "part", "cause"),
    [
        ("he had a big house there", "big", "large", "a", None),
        ("he had a big house there", "big", "enormous", "a", "another article"),
        ("he was very fond of cats", "fond", "partial", "a", "with a preposition"),
        ("the whole house was big", "big", "large", "a", "after the noun"),
        ("a big house", "big", "large", "a", "a phrase of fewer than five words"),
        ("he spoke highly of his old friends", "highly", "extremely", "r", "with a preposition"),
        ("he had a big house there", "big", "vol.", "a", "a name or an abbreviation"),
    ],
)
def test_a_synonym_must_fit_where_the_word_was(
    example: str, word: str, other: str, part: str, cause: str | None
) -> None:
    assert dictionary.unfit(example, word, other, part) == cause


def country(name: str, code: str, **facts: Any) -> dict[str, Any]:
    return {
        "name": name,
        "ISO": {"alpha2": code[:2], "alpha3": code},
        "population": 5_000_000,
        "region": "Africa",
        **facts,
    }


COUNTRIES = [
    country("Aland", "AAA", capital="Atown", borders=["BBB"]),
    country("Netherlands", "BBB", capital="Btown", borders=["AAA"]),
    country("Cland", "CCC", capital="Cland", borders=["AAA"], region="Asia"),
    country("Bolivia", "BOL", capital="Sucre", borders=[], region="Americas"),
    country("Eland", "EEE", capital="Atown", borders=None, region="Europe", population=1000),
]


def test_questions_on_countries() -> None:
    table = countries.capital_table(COUNTRIES)
    assert rows_of(table, "question", "answer") == [
        ("What is the capital of Aland?", "Atown"),
        ("What is the capital of the Netherlands?", "Btown"),
        ("Of which country or territory is Btown the capital?", "Netherlands"),
        ("What is the capital of Eland?", "Atown"),  # two countries have this capital: not asked the other way round
    ]
    assert table.dropped == {"called as the country": 1, "more than one answer, or an outdated one": 1}
    table = countries.border_table(COUNTRIES)
    assert ("Which countries share a land border with Aland?", "The Netherlands") in rows_of(
        table, "question", "answer"
    )
    assert table.dropped["the neighbours do not agree"] == 1  # Cland says that it borders on Aland; Aland does not
    places = rows_of(countries.place_table(COUNTRIES), "premise", "hypothesis", "label")
    assert {label for *_, label in places} == {"entailment", "neutral", "contradiction"}
    for premise, hypothesis, label in places:
        ends = tuple(re.search(r"in (.+)\.$", text)[1] for text in (premise, hypothesis))  # type: ignore[index]
        inside = {"Aland": "Africa", "the Netherlands": "Africa", "Cland": "Asia"}
        assert (label == "entailment") == (inside.get(ends[0]) == ends[1]), (premise, hypothesis)
        assert (label == "neutral") == (inside.get(ends[1]) == ends[0]), (premise, hypothesis)


def test_names_in_other_languages() -> None:
    english = SimpleNamespace(
        territories={"DE": "Germany", "FR": "France", "150": "Europe", "AQ": "Antarctica"},
        languages={"de": "German", "xx": "Xish", "yy": "Yish (old)"},
        currencies={"EUR": "Euro", "AAA": "Crown", "BBB": "Crown"},
    )
    other = SimpleNamespace(
        territories={"DE": "Deutschland", "FR": "Frankreich", "150": "Europa", "AQ": "Antarktis"},
        languages={"de": "Deutsch", "yy": "Ypsisch"},
        currencies={"EUR": "Euro", "AAA": "Krone", "BBB": "Taler"},
    )
    table = place_names.name_table("de", english, other)
    expected = [("Germany", "Deutschland"), ("France", "Frankreich"), ("German", "Deutsch")]
    assert sorted(rows_of(table, "english", "translation")) == sorted(expected)
    assert table.dropped == {
        "a group of countries, or disputed": 2,
        "no name in the language": 1,
        "with a note in parentheses, or years": 1,
        "two things of one name": 2,
        "equal in both languages": 1,
    }
    table = place_names.currency_table("de", "Welche? {place}", {"DE": ["EUR"], "FR": ["EUR", "AAA"]}, other)
    assert rows_of(table, "question", "answer") == [("Welche? Deutschland", "Euro")]


def test_worked_answers_are_checked_step_by_step() -> None:
    def item(question: str, answer: str, steps: str, last: str) -> dict[str, Any]:
        given = f"{question} Give the result as your final answer. Do not include units."
        return {"question": given, "answer": answer, "metadata": {"answer_cot": f"{steps}\n#### {last}"}}

    table = puzzles.word_problem_table(
        [
            item("Right?", "14", "2 * 3 = 6.0 apples.\nSo 6.0 + 8 = 14 apples.", "14"),
            item("Right, of equal form?", "1200", "It costs 100 x 12 = $1,200.", "1200.0"),
            item("Wrong step?", "15", "2 * 3 = 7 apples, 7 + 8 = 15", "15"),
            item("Other end?", "15", "7 + 8 = 15", "16"),
            item("Answer not there?", "3", "7 + 8 = 15", "3"),
            item("In 0.33333 hours?", "15", "7 + 8 = 15", "15"),
        ]
    )
    assert rows_of(table, "question", "answer", "rationale") == [
        ("Right?", "14", "2 * 3 = 6 apples.\nSo 6 + 8 = 14 apples."),
        ("Right, of equal form?", "1200", "It costs 100 x 12 = $1,200."),
    ]
    assert sum(table.dropped.values()) == 4 and len(table.dropped) == 4
    assert puzzles.is_right("10 / 3", "3.33") and not puzzles.is_right("10 / 3", "3.4")
    assert puzzles.is_right("10 / 20", "50%") and puzzles.is_right("2x + 100", "184")  # not of the form that is checked


def test_sums_legs_and_syllogisms() -> None:
    pytest.importorskip("reasoning_gym")
    sums = [
        {"answer": "-3", "metadata": {"expression": "4 - 9 + 2"}},
        {"answer": "5", "metadata": {"expression": "2 + 2"}},
    ]
    table = puzzles.sum_table(sums)
    assert rows_of(table, "question", "answer", "rationale") == [
        ("What is 4 - 9 + 2?", "-3", "4 - 9 = -5\n-5 + 2 = -3")
    ]
    assert table.dropped == {"the running total is another one": 1}
    table = puzzles.leg_table([{"answer": "32", "metadata": {"animals": {"woodlouse": 2, "deer": 1}}}])
    expected = "2 woodlice have 2 x 14 = 28 legs.\n1 deer has 1 x 4 = 4 legs.\nTogether: 28 + 4 = 32."
    assert rows_of(table, "rationale") == [expected]
    made = puzzles.syllogism_table(puzzles.items("syllogism", size=60))
    assert set(rows_of(made, "label")) == {"yes", "no"} and made.dropped["labelled wrongly"]


def test_families_ask_for_persons_whose_relation_has_one_word() -> None:
    text = "Ann is married to Bob. They have a child called Sky.\n\nWhat is {} to Bob? Respond only with the word."
    found = [{"question": text.format(n), "answer": "wife", "metadata": {"person1": n}} for n in ("Ann", "Sky")]
    table = puzzles.family_table(found)
    expected = ("Ann is married to Bob. They have a child called Sky.", "What is Ann to Bob?", "wife")
    assert rows_of(table, "context", "question", "answer") == [expected]
    assert table.dropped == {"a person who may be a man or a woman": 1}


@pytest.mark.parametrize(
    ("premises", "conclusion", "always", "if_they_exist"),
    [
        (["All ants are cats", "All cats are bees"], "All ants are bees", True, True),
        (["All ants are cats", "All cats are bees"], "Some ants are bees", False, True),
        (["All ants are cats", "Some cats are not bees"], "Some ants are not bees", False, False),
        (["Some ants are cats", "No cats are bees"], "Some ants are not bees", True, True),
        (["No ants are cats", "All cats are bees"], "No ants are bees", False, False),
    ],
)
def test_what_follows(premises: list[str], conclusion: str, always: bool, if_they_exist: bool) -> None:
    assert puzzles.follows(premises, conclusion, False) == always
    assert puzzles.follows(premises, conclusion, True) == if_they_exist
