"""Fetch Debian's `tuxpaint-stamps-default` and write its pictures with questions on them, for the recipe `vision`.

    python examples/data/stamps.py [FOLDER]      # 160 MB are fetched; three minutes

The stamps are for children, and are GPL-2: they are fetched by apt-get and unpacked, not installed, and no part of
posttrain. FOLDER then has small pictures on white squares and JSONL files with prompt, completion and image:

    train_captions.jsonl, train_kinds.jsonl, train.jsonl names and captions; kinds; all questions
    held_out/captions.jsonl                              names and captions
    held_out/{names,kinds,is_it,is_kind,languages}.jsonl questions with choices
    wrong_picture/...                                    the same questions, with the picture of another thing

A quarter of the pictures is held out. Variants of a thing (numbered, coloured, mirrored, or alike in their pixels) are
in the same part. Questions with choices come in groups whose pictures share the choices, each right once, so a model
that does not see the picture is right by chance and no more: names and languages 1 of 4, is_it and is_kind 1 of 2.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from downloads import Downloads, FetchError

from posttrain.core.errors import PosttrainError
from posttrain.core.files import write_lines
from posttrain.data.pictures import read_picture

PACKAGE = "tuxpaint-stamps-default"
LANGUAGES = {"German": "de", "French": "fr", "Spanish": "es"}
LEFT_OUT = ("symbols", "military", "naturalforces")
"""Folders of letters, coins and other signs, and of what children's pictures of war are."""
KINDS = {
    "animals": "an animal",
    "clothes": "clothing",
    "food": "food",
    "hobbies/music": "a musical instrument",
    "household": "a household item",
    "plants": "a plant",
    "sports": "sports equipment",
    "town/houses": "a building",
    "town/roadsigns": "a road sign",
    "vehicles": "a vehicle",
}
"""Kinds of things by the folder of their pictures. Other folders, such as seasonal, hold things of many kinds."""
VARIANT = re.compile(
    r"mirror|left|right|red|green|blue|yellow|white|black|brown|pink|purple|golden|new|old|\d+|[-_]\w$|[-_. ]"
)
NAME = re.compile(r"(An?|The|Some|Two) [^.!?,;:()“”\"]{2,38}\.?")
"""A caption that names the thing, with its article."""
SIDE = 224
GRID = 16
ALIKE = 15.0
"""Mean difference of colours (of 255, white ground aside) below which two pictures show variants of a thing."""
HELD_OUT = 4
"""One of so many groups of pictures is held out."""


@dataclass
class Stamp:
    """Hold a picture and its texts.

    Attributes:
        path: Path inside the stamps' folder, with / between folders.
        texts: Its caption by language; "" is English.
        colours: Its mean colours on a grid, (GRID, GRID, 3).
        group: Number of the group of variants.
    """

    path: str
    texts: dict[str, str]
    colours: np.ndarray = field(repr=False)
    group: int = 0

    @property
    def kind(self) -> str | None:
        """Return the kind of thing, such as "an animal"; None if its folder does not tell."""
        return next((kind for folder, kind in KINDS.items() if self.path.startswith(f"{folder}/")), None)

    @property
    def name(self) -> str | None:
        """Return the caption if it is a name such as "A frog."."""
        return self.texts[""] if NAME.fullmatch(self.texts[""]) else None

    @property
    def inside(self) -> str:
        """Return the name as it stands inside a sentence: "a frog"."""
        name = (self.name or "").rstrip(".")
        return name[:1].lower() + name[1:]

    @property
    def order(self) -> str:
        """Return a hash by which stamps are put into a fixed order that says nothing about them."""
        return hashlib.sha256(self.path.encode()).hexdigest()

    @property
    def image(self) -> str:
        """Return the name of its file in the folder of pictures."""
        return self.path.replace("/", "-").rsplit(".", 1)[0] + ".jpg"


def read_texts(path: Path) -> dict[str, str]:
    """Return the caption by language of a stamp's .txt file; "" is English, in the first line."""
    first, *others = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    pairs = (line.partition(".utf8=") for line in others)
    return {"": first.strip()} | {code: text.strip() for code, mark, text in pairs if mark and text.strip()}


def read_stamps(root: Path, pictures: Path) -> tuple[list[Stamp], Counter[str]]:
    """Read the stamps, and write each picture small, on a white square.

    Args:
        root: Folder of the stamps.
        pictures: Where to.

    Returns:
        The stamps in the order of their paths, and how many were left out for which reason.
    """
    pictures.mkdir(parents=True, exist_ok=True)
    stamps, dropped = [], Counter[str]()
    for path in sorted(root.rglob("*.png")):
        place, text = path.relative_to(root), path.with_suffix(".txt")
        if place.parts[0] in LEFT_OUT:
            dropped[f"in {place.parts[0]}"] += 1
        elif not text.exists() or not (texts := read_texts(text))[""]:
            dropped["without a caption"] += 1
        else:
            small = square(read_picture(path).open())
            stamp = Stamp(place.as_posix(), texts, colours_of(small))
            small.save(pictures / stamp.image, quality=92)
            stamps.append(stamp)
    return stamps, dropped


def square(image: Any) -> Any:
    """Return what an image shows, its white margin cut off, in the middle of a white square of `SIDE` pixels."""
    from PIL import Image, ImageChops

    box = ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox()
    image = image.crop(box) if box else image
    scale = SIDE / max(image.size)
    image = image.resize(tuple(max(1, round(side * scale)) for side in image.size))
    out = Image.new("RGB", (SIDE, SIDE), "white")
    out.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return out


def colours_of(image: Any) -> np.ndarray:
    """Return the mean colours of an image on a grid."""
    from PIL import Image

    return np.asarray(image.resize((GRID, GRID), Image.Resampling.BOX), dtype=np.float32)


def differences(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the mean differences of a picture's colours from those of others, where one of the two is not white.

    Args:
        one: Its colours, (GRID, GRID, 3).
        others: Those of the others, (N, GRID, GRID, 3).
    """
    shown = (np.minimum(one, others) < 245).any(-1)
    apart = np.abs(one - others).mean(-1) * shown
    return np.asarray(apart.sum((1, 2)) / np.maximum(shown.sum((1, 2)), 1))


def group_variants(stamps: Sequence[Stamp]) -> None:
    """Give stamps the same group if they are variants: by the file's name in its folder, or by their pixels."""
    by_name: dict[str, int] = {}
    colours = np.stack([stamp.colours for stamp in stamps])
    for number, stamp in enumerate(stamps):
        folder, _, file = stamp.path.rpartition("/")
        stem = VARIANT.sub("", file.rsplit(".", 1)[0].lower())
        stamp.group = by_name.setdefault(f"{folder}/{stem or file}", number)
        before = colours[:number]
        apart = np.minimum(differences(stamp.colours, before), differences(stamp.colours, before[:, :, ::-1]))
        for other in np.flatnonzero(apart < ALIKE):
            first, last = sorted((stamp.group, stamps[int(other)].group))
            for member in stamps[: number + 1]:
                member.group = first if member.group == last else member.group


def split(stamps: Sequence[Stamp]) -> tuple[list[Stamp], list[Stamp]]:
    """Return the stamps to train on and those held out: of each kind, every fourth group of variants."""
    kinds: dict[str | None, dict[int, list[Stamp]]] = defaultdict(lambda: defaultdict(list))
    first = {stamp.group: stamp.kind for stamp in reversed(stamps)}  # the kind of a group is that of its first stamp
    for stamp in sorted(stamps, key=lambda s: s.order):
        kinds[first[stamp.group]][stamp.group].append(stamp)
    parts: tuple[list[Stamp], list[Stamp]] = ([], [])
    for groups in kinds.values():
        for number, group in enumerate(groups.values()):
            parts[number % HELD_OUT == HELD_OUT - 1].extend(group)
    return parts


def blocks(stamps: Sequence[Stamp], size: int, language: str = "") -> list[list[Stamp]]:
    """Return groups of `size` stamps with different names; the last ones that fill no group are left out."""
    waiting: list[list[Stamp]] = []
    full = []
    for stamp in stamps:
        text = stamp.texts[language].casefold()
        block = next((b for b in waiting if text not in {s.texts[language].casefold() for s in b}), None)
        if block is None:
            waiting.append(block := [])
        block.append(stamp)
        if len(block) == size:
            full.append(block)
            waiting.remove(block)
    return full


def kind_pairs(stamps: Iterable[Stamp]) -> list[list[Stamp]]:
    """Return pairs of stamps of different kinds."""
    known = sorted((s for s in stamps if s.kind), key=lambda s: (s.kind or "", s.order))
    half = len(known) // 2  # two stamps this far apart are of one kind only if that is more than half of all
    return [[a, b] for a, b in zip(known[:half], known[half:], strict=False) if a.kind != b.kind]


def row(prompt: str, completion: str, stamp: Stamp, other: Stamp, **columns: Any) -> dict[str, Any]:
    """Return a question on a stamp; `other` is what the wrong picture shows."""
    return {"prompt": prompt, "completion": completion, "image": stamp.image, **columns, "other": other.image}


def captions(stamps: Sequence[Stamp]) -> list[dict[str, Any]]:
    """Return the names of things, and captions that are no names."""
    short = [s for s in stamps if s.name or len(s.texts[""]) <= 80]
    return [
        row("What is this?" if a.name else "Describe this picture.", a.texts[""], a, b)
        for a, b in zip(short, [*short[1:], *short[:1]], strict=True)
    ]


def questions(stamps: Sequence[Stamp]) -> dict[str, list[dict[str, Any]]]:
    """Return the questions with choices, by the name of their file."""
    named = [s for s in stamps if s.name]
    out: dict[str, list[dict[str, Any]]] = {"names": [], "kinds": [], "is_it": [], "is_kind": [], "languages": []}
    for block in blocks(named, 4):
        choices = [s.texts[""] for s in block]
        out["names"] += [
            row("What is this?", s.texts[""], s, block[i - 1], choices=choices) for i, s in enumerate(block)
        ]
    for pair in blocks(named, 2):
        for about in pair:
            for shown, other in (pair, pair[::-1]):
                answer = "yes" if shown is about else "no"
                out["is_it"].append(row(f"Is this {about.inside}?", answer, shown, other, choices=["yes", "no"]))
    for pair in kind_pairs(stamps):
        for shown, other in (pair, pair[::-1]):
            asked = "What kind of thing is this?"
            out["kinds"].append(row(asked, str(shown.kind), shown, other, choices=list(KINDS.values())))
            for about in pair:
                answer = "yes" if shown.kind == about.kind else "no"
                out["is_kind"].append(row(f"Is this {about.kind}?", answer, shown, other, choices=["yes", "no"]))
    for number, (language, code) in enumerate(LANGUAGES.items()):
        usable = [s for s in named if 2 < len(s.texts.get(code, "")) <= 40 and s.texts[code] != s.texts[""]]
        for block in blocks(usable[number:] + usable[:number], 4, code):
            choices = [s.texts[code] for s in block]
            out["languages"] += [
                row(f"What is this in {language}?", s.texts[code], s, block[i - 1], choices=choices)
                for i, s in enumerate(block)
            ]
    return out


def write_rows(stamps: Sequence[Stamp], folder: Path) -> dict[str, int]:
    """Write the files of rows, and return the number of rows of each.

    Args:
        stamps: All stamps, with their groups.
        folder: Where to; the folder `pictures` is in it.
    """
    trained, held_out = (sorted(part, key=lambda s: s.order) for part in split(stamps))
    asked = questions(trained)
    files = {"train_captions": captions(trained)}
    files["train_kinds"] = asked["kinds"]
    files["train"] = [*files["train_captions"], *(r for name in asked if name != "names" for r in asked[name])]
    tests = {"captions": captions(held_out), **questions(held_out)}
    files |= {f"held_out/{name}": rows for name, rows in tests.items()}
    files |= {f"wrong_picture/{name}": [{**r, "image": r["other"]} for r in rows] for name, rows in tests.items()}
    for name, rows in files.items():
        columns = ["prompt", "completion", "image"] + ["choices"] * (not name.startswith("train"))
        up = "../" * name.count("/")
        lines = [{c: r[c] for c in columns if c in r} | {"image": f"{up}pictures/{r['image']}"} for r in rows]
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lines(path, lines)
    return {name: len(rows) for name, rows in files.items()}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns 1 if the stamps can't be had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("data/stamps"), help="where to (data/stamps)")
    given = parser.parse_args(arguments)
    downloads = Downloads(given.folder / ".downloads")
    print(f"Debian's package {PACKAGE} (GPL-2), by apt-get", flush=True)
    try:
        root = downloads.deb(PACKAGE) / "usr/share/tuxpaint/stamps"
        stamps, dropped = read_stamps(root, given.folder / "pictures")
        if not stamps:
            raise FetchError(f"{PACKAGE} has no pictures in {root.name}: it is another version than this script reads")
        group_variants(stamps)
        counts = write_rows(stamps, given.folder)
    except (FetchError, PosttrainError, OSError) as error:
        print(f"stamps: {error}", file=sys.stderr)
        return 1
    shutil.rmtree(downloads.folder)
    left_out = ", ".join(f"{number} {cause}" for cause, number in dropped.most_common())
    print(f"{len(stamps)} pictures in {len({s.group for s in stamps})} groups of variants (left out: {left_out})")
    print("\n".join(f"  {name}.jsonl: {number} rows" for name, number in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
