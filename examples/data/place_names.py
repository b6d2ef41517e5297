"""Names of territories, languages and currencies in other languages, and questions on currencies in six languages.

From CLDR, the Unicode Consortium's locale data, as the package Babel has it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from datetime import date
from typing import Any

from downloads import Downloads
from tables import Table, Task, translation_task

PACKAGE, VERSION = "babel", "2.19.0"
ABOUT = f"PyPI's wheel of {PACKAGE} {VERSION}, with the locale data of CLDR"
LICENCE = "BSD-3-Clause (Babel), Unicode-3.0 (CLDR)"

LANGUAGES = ("ar", "cs", "de", "el", "es", "fi", "fr", "he", "hi", "hu", "id", "it", "ja", "ko", "nl", "pl", "pt", "ru",
             "sv", "sw", "th", "tr", "uk", "vi", "zh")  # fmt: skip
TODAY = date(2026, 1, 2)
"""For which the currencies are asked, so that the table does not change with the day."""
QUESTIONS = {
    "en": "Country or territory: {place}\nWhich currency is used there?",
    "de": "Land oder Gebiet: {place}\nWelche Währung gilt dort?",
    "es": "País o territorio: {place}\n¿Qué moneda se usa allí?",
    "fr": "Pays ou territoire : {place}\nQuelle monnaie y utilise-t-on ?",
    "it": "Paese o territorio: {place}\nQuale valuta si usa lì?",
    "sv": "Land eller territorium: {place}\nVilken valuta används där?",
}
NOT_PLACES = {
    "EU",
    "EZ",
    "UN",
    "QO",
    "XA",
    "XB",
    "XK",
    "ZZ",
    "AQ",
    "PS",
    "EH",
    "BV",
    "HM",
    "CP",
    "CQ",
    "TF",
    "UM",
    "GS",
}
"""Groups of countries, codes for tests, and places without inhabitants or with a disputed status."""


def make_tables(downloads: Downloads) -> Iterator[Table]:
    """Yield a table of names for each language, and the tables of questions."""
    sys.path.insert(0, str(downloads.wheel(PACKAGE, VERSION)))  # Babel reads its own data
    from babel import Locale
    from babel.numbers import get_territory_currencies

    english = Locale("en")
    for code in LANGUAGES:
        yield name_table(code, english, Locale(code))
    currencies = {place: get_territory_currencies(place, TODAY, TODAY) for place in sorted(english.territories)
                  if len(place) == 2 and place.isalpha() and place not in NOT_PLACES}  # fmt: skip
    for code, question in QUESTIONS.items():
        yield currency_table(code, question, currencies, Locale(code))


def name_table(code: str, english: Any, other: Any) -> Table:
    """Return English names with those of another language.

    Args:
        code: The other language.
        english: Babel's locale of English, or what has its attributes territories, languages and currencies.
        other: That of the other language.
    """
    table = Table(f"names_{code}", [name_task(code)], unique=("english",))
    for kind in ("territories", "languages", "currencies"):
        ours, theirs = getattr(english, kind), getattr(other, kind)
        twice = {name for name, count in Counter(ours.values()).items() if count > 1}
        for key in sorted(ours):
            name, translation = ours[key], theirs.get(key)
            if kind == "territories" and (not key.isalpha() or key in NOT_PLACES):
                table.drop("a group of countries, or disputed", name)
            elif translation is None:
                table.drop("no name in the language", name)
            elif name in twice:
                table.drop("two things of one name", name)
            elif name == translation:
                table.drop("equal in both languages", name)
            elif "(" in name + translation or translation == key or any(c.isdigit() for c in name):
                table.drop("with a note in parentheses, or years", f"{name}: {translation}")
            else:
                table.add(kind=kind, english=name, translation=translation)
    return table


def name_task(code: str) -> Task:
    """Return the task file's entry for the names of one language."""
    return translation_task(f"names_{code}", code, "geography")


def currency_task(code: str) -> Task:
    """Return the task file's entry for the questions in one language."""
    task: Task = {
        "name": f"currencies_{code}",
        "type": "question_answering",
        "cluster": "geography",
        "language": code,
        "domain": "geography",
        "data": {"source": f"currencies_{code}.jsonl"},
        "fields": {"question": "{question}"},
        "output": "{answer}",
        "shipped_wordings": code == "en",
    }
    if code != "en":
        task["wordings"] = ["{question}"]
    return task


def currency_table(code: str, question: str, currencies: dict[str, list[str]], locale: Any) -> Table:
    """Return questions on currencies in a language.

    Args:
        code: The language.
        question: With {place}.
        currencies: Codes of the legal tender by territory.
        locale: Babel's locale of the language.
    """
    table = Table(f"currencies_{code}", [currency_task(code)], unique=("question",))
    for place, found in currencies.items():
        name = locale.territories.get(place)
        if len(found) != 1:
            table.drop("no currency, or several", f"{name}: {found}")
        elif name is None or found[0] not in locale.currencies:
            table.drop("no name in the language", place)
        else:
            table.add(place=place, question=question.format(place=name), answer=locale.currencies[found[0]])
    return table
