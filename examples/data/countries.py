"""Questions on countries, and inference about places, from the package countryinfo."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from downloads import Downloads
from tables import Table

PACKAGE, VERSION = "countryinfo", "1.0.1"
ABOUT = f"PyPI's wheel of {PACKAGE} {VERSION}"
LICENCE = "MIT"

NO_CAPITAL_QUESTION = {
    "BI": "moved to Gitega",
    "BO": "Sucre and La Paz",
    "CI": "Yamoussoukro and Abidjan",
    "CS": "no longer exists",
    "EH": "disputed",
    "GQ": "moving",
    "HK": "a city",
    "IL": "disputed",
    "KZ": "renamed twice",
    "LK": "two",
    "MO": "a city",
    "MS": "Plymouth is abandoned",
    "MY": "two",
    "NL": "two",
    "NR": "none by law",
    "PS": "disputed",
    "SM": "the name of the country",
    "SZ": "two",
    "TZ": "moved",
    "VA": "the city is the country",
    "ZA": "three",
    "BJ": "two",
    "YE": "two governments",
    "GS": "no population",
    "AN": "no longer exists",
    "TW": "disputed",
    "TK": "one on each atoll",
    "PF": "misspelt",
}
"""Codes of countries of which one capital is no answer, or not the data's, and why."""
NOT_ASKED = set("EH PS CS AN TF HM BV AQ UM GS IO SJ".split())
"""Without a settled government or without inhabitants."""
NOT_BORDERS = {("IN", "LK"), ("CN", "HK"), ("CN", "MO"), ("GB", "CY"), ("FR", "SR"), ("ES", "GI")}
"""Pairs that the data names although there is sea between them, or that are parts of another country."""
BORDERS_MISSING = set(
    "MA DZ MR RU US FR GB NL DK CY RS ME AL MK BA HR CN IL EG JO SY LB IN PK AF LK AE OM SA ES IT VA UA SO".split()
)
"""With borders that the data lacks, that are disputed, or that depend on what is part of the country."""
TWO_CONTINENTS = set("RU TR EG KZ AZ GE AM CY ID ES FR US NL PT DK GR YE".split())
WITH_ARTICLE = set(
    (
        "Netherlands; Philippines; United States; United Kingdom; United Arab Emirates; Bahamas; Gambia; "
        "Maldives; Czech Republic; Dominican Republic; Central African Republic; Republic of the Congo; "
        "Democratic Republic of the Congo; Solomon Islands; Marshall Islands; Comoros; Seychelles; Cayman "
        "Islands; Cook Islands; Falkland Islands; Faroe Islands; Isle of Man; Cocos (Keeling) Islands; "
        "Pitcairn Islands; Turks and Caicos Islands; Northern Mariana Islands; British Virgin Islands; US "
        "Virgin Islands; Åland Islands"
    ).split("; ")
)
RENAMED = {
    "Swaziland": "Eswatini",
    "Republic of Macedonia": "North Macedonia",
    "The Bahamas": "Bahamas",
    "The Gambia": "Gambia",
    "Federated States of Micronesia": "Micronesia",
    "Virgin Islands, British": "British Virgin Islands",
    "Virgin Islands, U.S.": "US Virgin Islands",
}
CONTINENTS = {"Africa": "Africa", "Europe": "Europe", "Asia": "Asia", "Oceania": "Oceania"}
PEOPLE = ("Amara", "Boris", "Chen", "Dalia", "Emil", "Fatima", "Goran", "Hana", "Ivo", "Jamila", "Kofi", "Lena")
SENTENCES = (
    "NAME was born in {}.",
    "At this moment NAME is in {}.",
    "NAME died in {}.",
    "The wedding of NAME was in {}.",
)
"""Each of what happens in one place only."""

Country = Mapping[str, Any]


def make_tables(downloads: Downloads) -> Iterator[Table]:
    """Yield the tables capitals, borders and places."""
    folder = downloads.wheel(PACKAGE, VERSION) / "countryinfo" / "data"
    countries = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    yield capital_table(countries)
    yield border_table(countries)
    yield place_table(countries)


def code(country: Country) -> str:
    """Return the ISO code of two letters, or nothing."""
    return str((country.get("ISO") or {}).get("alpha2") or "")


def called(country: Country) -> str:
    """Return the name, with the article that a sentence needs."""
    name = RENAMED.get(str(country["name"]), str(country["name"]))
    return f"the {name}" if name in WITH_ARTICLE else name


def capital_table(countries: Sequence[Country]) -> Table:
    """Return questions on capitals, both ways."""
    table = Table("capitals", unique=("question",))
    counts: dict[Any, int] = {}
    for country in countries:
        counts[str(country.get("capital"))] = counts.get(str(country.get("capital")), 0) + 1
    for country in countries:
        name, capital, key = called(country), country.get("capital"), code(country)
        if key in NOT_ASKED:
            table.drop("not asked about", name)
        elif not isinstance(capital, str) or not capital or "/" in capital:
            table.drop("no capital", name)
        elif key in NO_CAPITAL_QUESTION:
            table.drop("more than one answer, or an outdated one", f"{name}: {NO_CAPITAL_QUESTION[key]}")
        elif capital.casefold() == str(country["name"]).casefold():
            table.drop("called as the country", name)
        else:
            table.add(country=key, question=f"What is the capital of {name}?", answer=capital)
            if counts[capital] == 1:
                table.add(country=key, question=f"Of which country or territory is {capital} the capital?",
                          answer=name.removeprefix("the "))  # fmt: skip
    return table


def border_table(countries: Sequence[Country]) -> Table:
    """Return questions on the land borders of countries for which the data agrees in both directions."""
    table = Table("borders", unique=("question",))
    by_alpha3 = {str((c.get("ISO") or {}).get("alpha3")): c for c in countries if c.get("ISO")}
    for country in countries:
        name, key = called(country), code(country)
        own = str((country.get("ISO") or {}).get("alpha3"))
        found = [by_alpha3.get(other) for other in country.get("borders") or []]
        neighbours = [other for other in found if other is not None]
        pairs = {(key, code(n)) for n in neighbours} | {(code(n), key) for n in neighbours}
        if key in NOT_ASKED or country.get("borders") is None or not country.get("population"):
            table.drop("not asked about", name)
        elif key in BORDERS_MISSING or pairs & NOT_BORDERS:
            table.drop("disputed, or not right in the data", name)
        elif len(neighbours) < len(found) or any(own not in (n.get("borders") or []) for n in neighbours):
            table.drop("the neighbours do not agree", name)
        elif any(code(n) in NOT_ASKED for n in neighbours):
            table.drop("a neighbour without a settled government", name)
        elif neighbours:
            names = sorted(called(n) for n in neighbours)
            listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
            table.add(country=key, question=f"Which countries share a land border with {name}?", answer=upper(listed))
    return table


def upper(text: str) -> str:
    """Return the text with its first letter as a capital."""
    return text[:1].upper() + text[1:]


def place_table(countries: Sequence[Country]) -> Table:
    """Return inference about where somebody is.

    Being born in a country entails being born on its continent, and contradicts another continent or another country;
    being born on a continent leaves the country open. Countries on two continents, or with distant parts, are left out.
    """
    table = Table("places", unique=("premise", "hypothesis"))
    usable = []
    for country in countries:
        if country.get("region") not in CONTINENTS or not country.get("population"):
            table.drop("no continent, or one of two parts", str(country["name"]))
        elif code(country) in TWO_CONTINENTS | NOT_ASKED:
            table.drop("on two continents, or not asked about", str(country["name"]))
        elif int(country["population"]) < 300_000:
            table.drop("a small territory", str(country["name"]))
        else:
            usable.append(country)
    random_ = random.Random(2)
    for country in usable:
        name, continent = called(country), CONTINENTS[str(country["region"])]
        elsewhere = random_.choice([c for c in sorted(CONTINENTS.values()) if c != continent])
        other = random_.choice([c for c in usable if code(c) != code(country)])
        sentence = random_.choice(SENTENCES).replace("NAME", random_.choice(PEOPLE))
        for premise, hypothesis, label in (
            (name, continent, "entailment"),
            (name, elsewhere, "contradiction"),
            (name, called(other), "contradiction"),
            (continent, name, "neutral"),
        ):
            texts = {"premise": sentence.format(premise), "hypothesis": sentence.format(hypothesis)}
            if label == "contradiction" and random_.random() < 0.4:
                table.drop("a share of the contradictions, of which there are two to a country", texts["hypothesis"])
            else:
                table.add(country=code(country), label=label, **texts)
    return table
