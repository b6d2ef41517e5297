"""Messages of a program in English and in other languages: translation pairs, paraphrases, and which language it is.

From Django's .po files. Of an entry with plural forms, an entry marked as fuzzy, or one whose translation does not have
the placeholders and marks of the message, nothing is used.
"""

from __future__ import annotations

import ast
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from downloads import Downloads
from tables import Table, Task, translation_task

PACKAGE, VERSION = "django", "5.2.19"
ABOUT = f"PyPI's wheel of {PACKAGE} {VERSION}: its translations by volunteers"
LICENCE = "BSD-3-Clause"

FEWEST_PAIRS = 100
"""Languages with fewer are left out."""
VARIANTS = {"es": ("es_AR", "es_MX", "es_CO", "es_VE"), "pt": ("pt_BR",)}
"""Languages that were translated more than once: two translations of a message are paraphrases."""
TOLD_APART = (
    "ar bg ca cs da de el en es et eu fa fi fr he hi hu hy id is it ja ka ko lt lv mn nl pl pt ro ru sk sq sv sw ta th "
    "tr uk vi zh_Hans"
).split()
"""Languages of the task to name the language: one of each group that short texts do not tell apart."""
LANGUAGE_NAMES = {
    "af": "Afrikaans", "am": "Amharic", "ar": "Arabic", "ar_DZ": "Arabic (Algeria)", "ast": "Asturian",
    "az": "Azerbaijani", "be": "Belarusian", "bg": "Bulgarian", "bn": "Bengali", "br": "Breton", "bs": "Bosnian",
    "ca": "Catalan", "ckb": "Central Kurdish", "cs": "Czech", "cy": "Welsh", "da": "Danish", "de": "German",
    "dsb": "Lower Sorbian", "el": "Greek", "en": "English", "eo": "Esperanto", "es": "Spanish",
    "es_AR": "Spanish (Argentina)", "es_CO": "Spanish (Colombia)", "es_MX": "Spanish (Mexico)",
    "es_VE": "Spanish (Venezuela)", "et": "Estonian", "eu": "Basque", "fa": "Persian", "fi": "Finnish", "fr": "French",
    "fy": "Frisian", "ga": "Irish", "gd": "Scottish Gaelic", "gl": "Galician", "he": "Hebrew", "hi": "Hindi",
    "hr": "Croatian", "hsb": "Upper Sorbian", "hu": "Hungarian", "hy": "Armenian", "ia": "Interlingua",
    "id": "Indonesian", "ig": "Igbo", "io": "Ido", "is": "Icelandic", "it": "Italian", "ja": "Japanese",
    "ka": "Georgian", "kab": "Kabyle", "kk": "Kazakh", "km": "Khmer", "kn": "Kannada", "ko": "Korean", "ky": "Kyrgyz",
    "lb": "Luxembourgish", "lt": "Lithuanian", "lv": "Latvian", "mk": "Macedonian", "ml": "Malayalam",
    "mn": "Mongolian", "mr": "Marathi", "ms": "Malay", "my": "Burmese", "nb": "Norwegian Bokmål", "ne": "Nepali",
    "nl": "Dutch", "nn": "Norwegian Nynorsk", "os": "Ossetic", "pa": "Punjabi", "pl": "Polish", "pt": "Portuguese",
    "pt_BR": "Portuguese (Brazil)", "ro": "Romanian", "ru": "Russian", "sk": "Slovak", "sl": "Slovenian",
    "sq": "Albanian", "sr": "Serbian", "sr_Latn": "Serbian (Latin script)", "sv": "Swedish", "sw": "Swahili",
    "ta": "Tamil", "te": "Telugu", "tg": "Tajik", "th": "Thai", "tk": "Turkmen", "tr": "Turkish", "tt": "Tatar",
    "udm": "Udmurt", "ug": "Uyghur", "uk": "Ukrainian", "ur": "Urdu", "uz": "Uzbek", "vi": "Vietnamese",
    "zh_Hans": "Chinese (simplified)", "zh_Hant": "Chinese (traditional)",
}  # fmt: skip

PLACEHOLDER = re.compile(r"%\([A-Za-z_]+\)[a-z]|%[sdrif%]|\{[^{}]*\}|</?[a-z]+[^<>]*>|https?://\S+")
FORMATS = re.compile(r"[A-Za-z]([^A-Za-z]+[A-Za-z])*[^A-Za-z]*")
"""Letters with marks between them, such as Y-m-d."""


@dataclass
class Entry:
    """Hold an entry of a .po file: the message, its translation, and the marks of both."""

    message: str = ""
    translation: str = ""
    context: str = ""
    flags: set[str] = field(default_factory=set)
    plural: bool = False


def read_po(text: str) -> Iterator[Entry]:
    """Yield the entries of a .po file, the header not; obsolete entries (#~) are comments."""
    entry, key = Entry(), ""
    for line in [*text.splitlines(), ""]:
        if not line.strip():
            if entry.message:
                yield entry
            entry, key = Entry(), ""
        elif line.startswith("#,"):
            entry.flags |= {flag.strip() for flag in line[2:].split(",")}
        elif not line.startswith("#"):
            if not line.startswith('"'):
                key, _, line = line.partition(" ")
            value = ast.literal_eval(line.strip())  # a .po string has the escapes of a Python string
            if key == "msgid":
                entry.message += value
            elif key == "msgstr":
                entry.translation += value
            elif key == "msgctxt":
                entry.context += value
            else:  # msgid_plural, msgstr[0], ...
                entry.plural = True


def fault(entry: Entry) -> str | None:
    """Return why an entry makes no translation pair; None if it makes one."""
    if entry.plural:
        return "plural forms"
    if "fuzzy" in entry.flags:
        return "marked as fuzzy"
    if not entry.translation.strip():
        return "not translated"
    if entry.context and entry.context not in ("", "verb", "noun"):
        return "an abbreviation or a name of a month in context" if "abbr" in entry.context else "needs its context"
    if Counter(PLACEHOLDER.findall(entry.message)) != Counter(PLACEHOLDER.findall(entry.translation)):
        return "other placeholders than the message"
    if FORMATS.fullmatch(entry.message) or entry.message.isupper() or not re.search(r"[A-Za-z]{3}", entry.message):
        return "a format, not words"
    if ("\n" in entry.message.strip()) != ("\n" in entry.translation.strip()):
        return "other lines than the message"
    if entry.translation.strip() == entry.message.strip():
        return "left as the message is"
    return None


def read_pairs(folder: Path) -> dict[str, Table]:
    """Return the tables of translation pairs by language, from Django's .po files."""
    tables = {key: Table(f"messages_{key}", [message_task(key)], ("english",)) for key in LANGUAGE_NAMES}
    pairs: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for path in sorted(folder.rglob("*.po")):
        language = path.parts[-3]
        if language.startswith("en") or language not in tables:
            continue
        for entry in read_po(path.read_text(encoding="utf-8")):
            if cause := fault(entry):
                tables[language].drop(cause, f"{entry.message!r} -> {entry.translation!r}")
            else:
                pairs[language][entry.message.strip()].add(entry.translation.strip())
    for language, found in pairs.items():
        for message, translations in found.items():
            if len(translations) > 1:  # one word, two meanings: "Order" of a list, "Order" in a shop
                tables[language].drop("translated in two ways", f"{message!r} -> {sorted(translations)}")
            else:
                tables[language].add(english=message, translation=next(iter(translations)))
    return {language: table for language, table in tables.items() if len(table.rows) >= FEWEST_PAIRS}


def make_tables(downloads: Downloads) -> Iterator[Table]:
    """Yield a table of pairs for each language, the paraphrases, and the table to name the language."""
    tables = read_pairs(downloads.wheel(PACKAGE, VERSION))
    yield from tables.values()
    pairs = {key: {row["english"]: row["translation"] for row in table.rows} for key, table in tables.items()}
    for language, others in VARIANTS.items():
        yield paraphrase_table(language, [pairs[v] for v in (language, *others) if v in pairs])
    yield language_table(pairs)


def message_task(language: str) -> Task:
    """Return the task file's entry for the messages in one language."""
    return translation_task(f"messages_{language}", language.replace("_", "-"), "software")


def paraphrase_table(language: str, versions: list[dict[str, str]]) -> Table:
    """Return pairs of different translations of a message into (variants of) one language."""
    table = Table(f"paraphrases_{language}", unique=("text", "paraphrase"))
    for message in versions[0]:
        texts = [v[message] for v in versions if message in v]
        for other in texts[1:]:
            if _letters(texts[0]) == _letters(other):
                table.drop("equal but for case and punctuation", f"{texts[0]} | {other}")
            elif min(len(texts[0].split()), len(other.split())) < 4:
                table.drop("shorter than four words", f"{texts[0]} | {other}")
            else:
                table.add(english=message, text=texts[0], paraphrase=other)
    return table


def _letters(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.casefold()).strip()


def language_table(pairs: dict[str, dict[str, str]]) -> Table:
    """Return texts with the English name of their language, the same number for each language."""
    texts: dict[str, list[str]] = {"en": sorted({m for found in pairs.values() for m in found})}
    texts |= {language: list(pairs[language].values()) for language in TOLD_APART if language in pairs}
    known = Counter(text for found in texts.values() for text in set(found))
    table = Table("languages", unique=("text",))
    for language, found in texts.items():
        usable = []
        for text in found:
            plain = " ".join(text.split())
            if known[text] > 1:
                table.drop("a text of two languages", text)
            elif PLACEHOLDER.search(text):
                table.drop("with placeholders", text)
            elif len(plain) < 20 or (len(plain.split()) < 4 and language not in ("ja", "th", "zh_Hans")):
                table.drop("too short", plain)
            else:
                usable.append(plain)
        for text in random.Random(1).sample(usable, min(60, len(usable))):
            table.add(text=text, language=LANGUAGE_NAMES[language].removesuffix(" (simplified)"))
    return table
