"""Debian's package descriptions: summaries, subjects, translations, and extraction from texts and records."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from downloads import Downloads, FetchError, list_text
from tables import Table

ABOUT = "the package lists of the system's apt sources (Packages, Translation-en, Translation-de)"
LICENCE = "each description is part of its package, under the licences of that package"

SECTIONS = {
    "games": "games", "science": "science", "sound": "sound", "graphics": "graphics", "fonts": "fonts",
    "mail": "mail", "video": "video", "editors": "editors", "electronics": "electronics", "hamradio": "amateur radio",
    "database": "databases", "math": "mathematics",
}  # fmt: skip
"""Sections that say what a package is about; libs, python or misc do not."""
PER_SECTION = 200
SHORTEST, LONGEST = 200, 1500
"""Characters of a description that is summarised."""
SKIPPED = re.compile(
    r"\b(transitional|dummy|metapackage|meta-package|debug(ging)? symbols|Übergangspaket|Metapaket)\b", re.I
)
ACRONYM = re.compile(r"\(([A-Z][A-Za-z]{0,2}[A-Z][A-Za-z]{0,3})\)")


@dataclass(frozen=True)
class Package:
    """Hold the name of a package and the fields of its record."""

    name: str
    fields: Mapping[str, str]

    @property
    def source(self) -> str:
        """Return the name of the source package, which several packages share."""
        return self.fields.get("Source", self.name).split(" ")[0]


@dataclass(frozen=True)
class Description:
    """Hold a description: its first line, and the text in paragraphs."""

    synopsis: str
    text: str


def read_stanzas(text: str) -> Iterator[dict[str, str]]:
    """Yield the records of a list: fields by name; further lines of a field follow a line end."""
    for block in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in block.splitlines():
            if line[:1] in (" ", "\t"):
                fields[name] += f"\n{line}"
            elif ":" in line:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        if "Package" in fields:
            yield fields


def read_description(value: str) -> Description:
    """Read the value of Description: lines that begin with one space flow, with two stand as they are."""
    synopsis, *lines = value.splitlines()
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        content, words = line[1:], line.strip()
        last = paragraphs[-1][-1] if paragraphs[-1] else ""
        in_item = re.match(r"\n[-*+o•] ", last) and (content[:1].isspace() or words[:1].islower())
        if words == ".":
            paragraphs.append([])
        elif in_item and not re.match(r"[-*+o•] ", words):
            paragraphs[-1][-1] += f" {words}"
        elif re.match(r"\s|[-*+o•] ", content) or last.startswith("\n"):
            paragraphs[-1].append("\n" + words)
        else:
            paragraphs[-1].append(words)
    texts = (re.sub(r" *\n", "\n", " ".join(lines)).strip() for lines in paragraphs)
    return Description(" ".join(synopsis.split()), "\n\n".join(filter(None, texts)))


def make_tables(downloads: Downloads) -> Iterator[Table]:
    """Yield the tables synopses, synopses_de, sections, descriptions_de, acronyms and records."""
    lists = downloads.apt_lists(["en", "de"])
    packages = read_packages(lists)
    english, german = (read_translations(lists, language, packages) for language in ("en", "de"))
    yield synopsis_table("synopses", english, packages)
    yield synopsis_table("synopses_de", german, packages)
    yield section_table(english, packages)
    yield translation_table(english, german, packages)
    yield acronym_table(english)
    yield record_table(packages, english)


def read_packages(lists: list[Path]) -> dict[str, Package]:
    """Return the packages of the lists named ..._Packages; of several, the first. Raises FetchError without any."""
    found: dict[str, Package] = {}
    for path in lists:
        if re.search(r"_Packages(\.\w+)?$", path.name):
            for fields in read_stanzas(list_text(path)):
                found.setdefault(fields["Package"], Package(fields["Package"], fields))
    if not found:
        raise FetchError("apt's sources have no list of packages; expected Debian's or Ubuntu's in /etc/apt")
    return found


def read_translations(lists: list[Path], language: str, packages: Mapping[str, Package]) -> dict[str, Description]:
    """Return the current descriptions in a language by package.

    Args:
        lists: Files of apt's lists.
        language: Such as en.
        packages: The packages; a description of another version of a package is not used.

    Raises:
        FetchError: No source has the language.
    """
    found: dict[str, Description] = {}
    for path in lists:
        if re.search(rf"_Translation-{language}(\.\w+)?$", path.name):
            for fields in read_stanzas(list_text(path)):
                package = packages.get(fields["Package"])
                if package and package.fields.get("Description-md5") == fields.get("Description-md5"):
                    found.setdefault(package.name, read_description(fields.get(f"Description-{language}", "")))
    if not found:
        raise FetchError(f"apt's sources have no descriptions in the language {language}; Debian's archive has them")
    return found


def one_of_each_source(table: Table, names: Iterator[str], packages: Mapping[str, Package]) -> list[str]:
    """Return one package of each source: that of the same name, or the one with the shortest name.

    Args:
        table: Where the others are counted.
        names: Names of packages.
        packages: All packages.
    """
    of_source = defaultdict[str, list[str]](list)
    for name in names:
        of_source[packages[name].source].append(name)
    chosen = []
    for source, found in of_source.items():
        found.sort(key=lambda name: (name != source, len(name), name))
        chosen.append(found[0])
        for name in found[1:]:
            table.drop("another package of the same source", name)
    return chosen


def synopsis_table(name: str, descriptions: Mapping[str, Description], packages: Mapping[str, Package]) -> Table:
    """Return long descriptions with their one-line summaries.

    Args:
        name: Name of the table.
        descriptions: Descriptions by package.
        packages: All packages.
    """
    table = Table(name, unique=("text",))
    for package in one_of_each_source(table, iter(descriptions), packages):
        description = descriptions[package]
        synopsis, text = description.synopsis, description.text
        if SKIPPED.search(synopsis) or SKIPPED.search(text):
            table.drop("a package without content", synopsis)
        elif not SHORTEST <= len(text) <= LONGEST:
            table.drop(f"not {SHORTEST} to {LONGEST} characters", f"{package}: {len(text)}")
        elif len(synopsis.split()) < 3 or "<" in synopsis:
            table.drop("a synopsis of fewer than three words, or a broken one", synopsis)
        elif synopsis.casefold() in text.casefold():
            table.drop("the synopsis stands in the text", synopsis)
        else:
            table.add(package=package, text=text, synopsis=synopsis)
    return table


def section_table(descriptions: Mapping[str, Description], packages: Mapping[str, Package]) -> Table:
    """Return synopses and first paragraphs with the section that Debian filed the package under, equally many each."""
    table = Table("sections", unique=("text",))
    counts = dict.fromkeys(SECTIONS, 0)
    inside = (n for n in descriptions if packages[n].fields.get("Section") in SECTIONS)
    for package in one_of_each_source(table, inside, packages):
        section = packages[package].fields["Section"]
        description = descriptions[package]
        text = description.text.split("\n\n")[0]
        if SKIPPED.search(description.synopsis) or len(text) < 80 or len(text) > 700:
            table.drop("without content, or not 80 to 700 characters", description.synopsis)
        elif re.search(r"-(dev|doc|data|common|dbg|plugins?)$|^(lib|python3?-|r-cran)", package):
            table.drop("a part of something, such as a library", package)
        elif counts[section] >= PER_SECTION:
            table.drop("more than enough of its section", package)
        else:
            counts[section] += 1
            table.add(package=package, text=f"{description.synopsis}. {text}", section=SECTIONS[section])
    return table


def translation_table(
    english: Mapping[str, Description], german: Mapping[str, Description], packages: Mapping[str, Package]
) -> Table:
    """Return synopses and paragraphs in English with their German translations.

    Args:
        english: Descriptions by package.
        german: Translations by package.
        packages: All packages.
    """
    table = Table("descriptions_de", unique=("english",))
    for package in one_of_each_source(table, iter(german), packages):
        one, other = english.get(package), german[package]
        if one is None or "<trans>" in other.synopsis + other.text:
            table.drop("not translated", package)
            continue
        pairs = [(one.synopsis, other.synopsis)]
        ours, theirs = one.text.split("\n\n"), other.text.split("\n\n")
        if len(ours) == len(theirs):
            pairs.append((ours[0], theirs[0]))
        else:
            table.drop("other paragraphs than the English text", package)
        for text, translation in pairs:
            if text.casefold() == translation.casefold():
                table.drop("equal in both languages", text)
            elif len(text.split()) < 2 or not 0.6 <= len(translation) / len(text) <= 2:
                table.drop("too short, or of another length", f"{text} -> {translation}")
            elif len(text) > 600 or "\n" in text:
                table.drop("a list, or longer than 600 characters", text)
            else:
                table.add(package=package, english=text, german=translation)
    return table


def acronym_table(descriptions: Mapping[str, Description]) -> Table:
    """Return texts in which an abbreviation follows the words it stands for: "a real-time strategy game (RTS)"."""
    table = Table("acronyms", unique=("acronym", "answer"))
    for description in descriptions.values():
        for paragraph in description.text.split("\n\n"):
            found = list(ACRONYM.finditer(paragraph))
            if not found or not 60 <= len(paragraph) <= 500:
                continue
            acronym = found[0][1]
            words = stands_for(acronym, paragraph[: found[0].start()])
            if words is None:
                table.drop(
                    "the words before do not have its letters",
                    paragraph[max(0, found[0].start() - 60) : found[0].end()],
                )
            elif len(found) > 1:
                table.drop("several abbreviations", paragraph)
            else:
                table.add(text=paragraph, acronym=acronym, answer=words)
    return table


def stands_for(acronym: str, before: str) -> str | None:
    """Return the words at the end of a text whose first letters are the acronym's; None if they are not."""
    words = before.split()
    letters = [c.lower() for c in acronym if c.isupper()]
    last = words[-len(letters) :]
    if len(letters) < 2 or len(last) < len(letters) or any(c.islower() for c in acronym):
        return None
    if [word[0].lower() for word in last] != letters or any(re.search(r"[.,;:()\"']", word) for word in last):
        return None
    return " ".join(last)


def record_table(packages: Mapping[str, Package], descriptions: Mapping[str, Description]) -> Table:
    """Return records of packages with one of their fields to find; a field is asked for by what it means."""
    table = Table("records", unique=("text",))
    asked = {
        "Version": "the version", "Homepage": "the address of the web site", "Section": "the section of the archive",
        "Architecture": "the architecture", "Size": "the size of the file in bytes",
    }  # fmt: skip
    shown = (
        "Package",
        "Source",
        "Version",
        "Installed-Size",
        "Architecture",
        "Section",
        "Priority",
        "Homepage",
        "Size",
    )
    chosen = one_of_each_source(table, (n for n in packages if n in descriptions), packages)
    for number, package in enumerate(chosen):
        fields = packages[package].fields
        name = list(asked)[number % len(asked)]
        if name not in fields:
            table.drop(f"no field {name}", package)
            continue
        record = "\n".join(f"{key}: {fields[key]}" for key in shown if key in fields)
        text = f"{record}\nDescription: {descriptions[package].synopsis}"
        table.add(text=text, what=asked[name], answer=fields[name])
        if len(table.rows) == 3000:
            break
    return table
