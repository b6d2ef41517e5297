"""Texts of evaluations in rows: found whole, without false alarms, as an exact slow search finds them."""

import random
import unicodedata

import pytest

from posttrain.data import leaks as module
from posttrain.data.leaks import LeakIndex

WORDS = "the cat sat on a mat and it's well-known that 12 dogs, 3 birds ate 1,000 école's fish".split()


def slow_letters(text):
    """Letters with a bar before a digit that follows another number; boundaries of words; places of spaced words."""
    out, starts, spaced, gap = [], set(), [], "\n"
    folded = unicodedata.normalize("NFKC", text).casefold()
    for place, ch in enumerate(folded):
        if ch.isalnum() or unicodedata.category(ch)[0] == "M":
            thousands = gap == "," and out and out[-1][-1].isdigit() and folded[place : place + 3].isdigit()
            thousands = thousands and not folded[place + 3 : place + 4].isdigit()
            if gap and gap != "'" and not thousands:
                starts.add(len(out))
                if not out or any(c.isspace() for c in gap):
                    spaced.append(len(out))
                if out and out[-1][-1].isdigit() and ch.isdigit():
                    ch = "|" + ch
            out.append(ch)
            gap = ""
        else:
            gap += ch
    return out, starts | {len(out)}, spaced


def slow_search(items, rows, n):
    found = set()
    runs = []
    for number, item in enumerate(items):
        letters, _, spaced = slow_letters(item)
        ends = [*spaced[1:], len(letters)]
        if len(spaced) >= n:
            runs += [(number, letters[spaced[k] : ends[k + n - 1]], False) for k in range(len(spaced) - n + 1)]
        elif letters:
            runs.append((number, letters, len(spaced) < 4 or len(letters) < 6))
    for number, row in enumerate(rows):
        letters, boundaries, _ = slow_letters(row)
        for item, run, whole in runs:
            for start in boundaries:
                end = start + len(run)
                if end in boundaries and start < len(letters) and (not whole or (start, end) == (0, len(letters))):
                    if letters[start][-1] == run[0][-1] and letters[start + 1 : end] == run[1:]:
                        found.add((number, item))
    return found


@pytest.mark.parametrize("n", [3, 5, 8])
def test_finds_what_a_slow_exact_search_finds(n, monkeypatch):
    monkeypatch.setattr(module, "SHARED", 10**9)
    monkeypatch.setattr("posttrain.data.word_hashes.BATCH_LETTERS", 500)
    rng = random.Random(n)

    def text(most):
        gaps = [" ", "  ", ", ", "\n", "-", "'", ". ", " ... "]
        parts = [
            (w.upper() if rng.random() < 0.2 else w) + rng.choice(gaps)
            for w in rng.choices(WORDS, k=rng.randrange(most))
        ]
        return "".join(parts)

    items, rows = [text(12) for _ in range(60)], [text(25) for _ in range(150)]
    rows += [f"x {item} x" for item in items[::2]]
    index = LeakIndex(n)
    index.add("e", items)
    found = index.search(rows)
    assert set(zip(found.rows.tolist(), found.items.tolist(), strict=True)) == slow_search(items, rows, n)
    assert len(found.rows) >= 10


EVALUATION = [
    f"Item {i}: {' '.join(random.Random(i).sample([f'word{k}' for k in range(400)], 13 + i % 20))} isn't it?"
    for i in range(100)
]


def planted(item, number):
    """Return the texts of a row that has an item in it, in one of the ways in which rows get them."""
    words = item.split()
    some = words[number % 3 : number % 3 + 13]
    long = [f"filler{k}" for k in range(200)]
    ways = [
        [item],
        [item.upper()],
        ["Read this.\n" + ",  \t".join(words) + "!"],
        ["".join(c for c in item if c.isalnum() or c == " ")],
        [" ".join([*long[:100], *some, *long[100:]])],
        ["A prompt without anything.", "\u201c" + "\u00a0".join(words) + "\u201d"],
        ["Example 1:\n" + " ".join(some).title() + "\nOutput: x\n\nExample 2:\nother", "y"],
        [unicodedata.normalize("NFD", item).replace("word", "wo\u00adrd")],
        [item.replace("isn't", "isn\u2019t").replace(" ", "\u2009")],
        ["*" + "* *".join(words) + "*"],
    ]
    return ways[number % len(ways)]


def test_a_planted_set_of_leaks_is_found_whole_and_near_misses_are_not():
    index = LeakIndex()
    index.add("planted", EVALUATION)
    rng = random.Random(1000)
    clean = [" ".join(f"word{rng.randrange(400)}" for _ in range(60)) for _ in range(500)]
    near = [" ".join(["start", *item.split()[1:13], "end"]) for item in EVALUATION]
    inside = [" ".join(item.split()[:12]) + " " + item.split()[12] + "s" for item in EVALUATION]
    rows = [[text] for text in [*clean, *near, *inside]] + [planted(item, i) for i, item in enumerate(EVALUATION)]
    found = index.search(rows)
    first = len(rows) - 100
    assert list(zip(found.rows.tolist(), found.items.tolist(), strict=True)) == [(first + i, i) for i in range(100)]
    stats = found.stats["planted"]
    assert (stats["items"], stats["leaked_items"], stats["leaking_rows"]) == (100, 100, 100)
    assert stats["examples"][0] == {"row": first, "item": 0, "words": found.words[0]}


@pytest.mark.parametrize(
    ("item", "row", "leaks"),
    [
        ("What is the capital of France?", "Q: what is the capital of FRANCE", True),
        ("What is the capital of France?", "what is the capital of francesca", False),
        ("hello", "Hello!", True),
        ("hello", "hello you", False),
        ("What is 12 + 30?", "Now, what is 12+30? It is 42", True),
        ("What is 12 + 30?", "What is 12 - 30?", False),
        ("What is 12 + 3?", "What is 1 + 23?", False),
        ("What is 12 * 30?", "What is 12 / 30?", False),
        ("He paid 1,000 dollars for it", "he paid 1000 dollars for it", True),
        ("我喜欢在下雨天读一本很长很长的书", "他说：我喜欢在下雨天，读一本很长很。", True),
        ("我喜欢在下雨天读一本很长很长的书", "我喜欢在下雨天读一本很长", False),
        ("ฉันชอบอ่านหนังสือในวันที่ฝนตกมาก", "เขา ฉันชอบอ่านหนังสือในวันที่ฝนตก", True),
        ("नमस्ते दुनिया यह एक परीक्षा है", "नमस्ते, दुनिया: यह एक परीक्षा है।", True),
        ("Straße und École im Jahr ２０２０", "STRASSE und E\u0301COLE im Jahr 2020", True),
        ("Yarın ışık ile iki İYİ ırmak", "YARIN IŞIK İLE İKİ iyi IRMAK", True),
        ("I love this movie so much", "I love \u2764\ufe0f this movie so \u0031\ufe0f\u20e3 much", False),
        ("I love this movie so much", "I \u2764\ufe0f love\u2764\ufe0f this, movie so\u200b much", True),
        ("", "anything", False),
        ("...", "...", False),
    ],
)
def test_short_texts_scripts_and_numbers(item, row, leaks):
    index = LeakIndex()
    index.add("e", [item])
    assert bool(len(index.search([row]).rows)) is leaks


def test_wording_that_the_items_of_an_evaluation_share_is_not_their_content():
    wording = (
        "Decide whether the following review of a film, written by a visitor, is positive or negative and say why:"
    )
    items = [f"{wording} {' '.join(f'w{i}x{k}' for k in range(14))}" for i in range(40)]
    index = LeakIndex()
    index.add("reviews", items)
    found = index.search([f"{wording} something else", items[7], "w3x0 " * 20])
    assert (found.rows.tolist(), found.items.tolist()) == ([1], [7])
    assert found.stats["reviews"]["shared_runs"] > 0


def test_many_items_that_begin_alike_are_compared_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "COMPARED_RUNS", 100)
    beginning = "Solve the following puzzle about the animals of the farm near"
    items = [f"{beginning} town{i} and say which of them it is" for i in range(300)]
    monkeypatch.setattr(module, "SHARED", 10**9)
    index = LeakIndex()
    index.add("puzzles", items)
    found = index.search([f"{beginning} town{i}x and say", items[i]][i % 2] for i in range(200))
    assert list(zip(found.rows.tolist(), found.items.tolist(), strict=True)) == [(i, i) for i in range(1, 200, 2)]


def test_several_evaluations_count_their_own_items_and_text_in_both_counts_for_both():
    text = " ".join(f"w{k}" for k in range(15))
    index = LeakIndex()
    index.add("a", [text, "other words that are here"])
    index.add("b", [["question only", text]])
    found = index.search(["nothing", ["x", text]])
    assert found.leaking.tolist() == [1]
    assert {name: s["leaked_items"] for name, s in found.stats.items()} == {"a": 1, "b": 1}
    assert len(index) == 3
    assert LeakIndex().search(["x"]).stats == {}
