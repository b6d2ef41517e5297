"""Instruction rows from a million examples: built, searched for near duplicates and leaks, and measured; time, memory.

    pip install 'posttrain[instructions]'
    python benchmarks/instructions.py                  # 1,000,000 rows
    python benchmarks/instructions.py --rows 50000     # a short run

The examples are made of pieces of two to seven words of the packaged movie reviews: they share many runs of words, and
none nearly repeats another by chance. Ten tables hold them, with planted near duplicates (one word of an earlier
example changed, at least 0.8 of the three-word runs in common) and 100 planted texts of an evaluation of 1,000 items.
The script fails if a planted row is written, or if a row is left out that was not planted. The last line is
`memory_gib=` (the highest resident memory of the process) and `rows_per_second=` (rows written, over the time of the
whole stage).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import peak_memory_mib

from posttrain.core.files import write_json
from posttrain.data.readers import packaged_or_own
from posttrain.eval.evaluation_tasks import PerplexityTask
from posttrain.methods.data.instruction_quality import LEAKED, NEAR_DUPLICATE, InstructionQuality, read_rows
from posttrain.methods.data.instructions import Instructions, InstructionsConfig
from posttrain.trainer.stage import StageContext

TASKS = 10
HELD_OUT = 50
ITEMS = 1000
LEAKS = 100
GIB = 1 << 30


class Texts:
    """Make texts of pieces of the reviews."""

    def __init__(self, seed: int) -> None:
        lines = packaged_or_own("packaged:movie_reviews.tsv").read_text(encoding="utf-8").splitlines()[1:]
        self.words = " ".join(line.split("\t")[-1] for line in lines).split()
        self.rng = random.Random(seed)

    def text(self, shortest: int = 25, longest: int = 60) -> str:
        """Return a text of about so many words."""
        rng, words, out = self.rng, self.words, list[str]()
        wanted = rng.randrange(shortest, longest)
        while len(out) < wanted:
            first = rng.randrange(len(words) - 8)
            out += words[first : first + rng.randrange(2, 8)]
        return " ".join(out)


def near_duplicate(text: str, rng: random.Random) -> str:
    """Return a text with one of its last words changed: two runs of words at most differ, of 23 or more."""
    words = text.split()
    words[-1 - rng.randrange(2)] = f"changed{rng.randrange(10**6)}"
    return " ".join(words)


def leaked(item: str, number: int, texts: Texts) -> str:
    """Return a row that has an item, or 13 of its words, in it."""
    words = item.split()
    some = " ".join(words[number % 5 : number % 5 + 13])
    around = texts.text(25, 26), texts.text(25, 26)
    ways = (
        item,
        item.upper(),
        " -- ".join(words),
        f"{around[0]} {some} {around[1]}",
        f"{around[0]}: \u201c{item}\u201d",
    )
    return ways[number % len(ways)]


def write_table(path: Path, plain: int, items: list[str], texts: Texts) -> dict[str, str]:
    """Write a table with planted rows.

    Args:
        path: The table.
        plain: Rows that are not planted; every hundredth is followed by a near duplicate of an earlier one.
        items: Items that leak, each in one row.
        texts: Makes the texts.

    Returns:
        What was planted, by its place.
    """
    rng, planted, written = texts.rng, dict[str, str](), 0
    recent: list[tuple[str, str]] = []
    leak_after = {(k + 1) * plain // (len(items) + 1): k for k in range(len(items))}
    with path.open("w", encoding="utf-8") as table:
        table.write("text\tlabel\n")
        for number in range(1, plain + 1):
            row = texts.text(), rng.choice(("good", "bad"))
            recent = [*recent[-500:], row] if number % 7 == 0 else recent
            found = [(*row, "")]
            if number % 100 == 0:
                text, label = rng.choice(recent)
                found.append((near_duplicate(text, rng), label, NEAR_DUPLICATE))
            if (k := leak_after.get(number)) is not None:
                found.append((leaked(items[k], k, texts), "good", LEAKED.format("exam")))
            for text, label, cause in found:
                written += 1
                table.write(f"{text}\t{label}\n")
                if cause:
                    planted[f"{path.name}:{written}"] = cause
    return planted


def write_tables(folder: Path, rows: int) -> None:
    """Write the tables, the evaluation, and planted.json: in another process, whose memory does not count."""
    texts = Texts(0)
    items = [texts.text(20, 40) for _ in range(ITEMS)]
    (folder / "exam.jsonl").write_text("".join(json.dumps({"prompt": t, "completion": "good"}) + "\n" for t in items))
    planted: dict[str, str] = {}
    for t in range(TASKS):
        own = items[t * LEAKS // TASKS : (t + 1) * LEAKS // TASKS]
        planted |= write_table(folder / f"task{t}.tsv", rows // TASKS + HELD_OUT, own, texts)
    write_json(folder / "planted.json", planted)


def stage(folder: Path, rows: int) -> Instructions:
    """Return the stage over the tables."""
    fields = {"type": "classification", "cluster": "sentiment", "fields": {"input": "{text}"}, "output": "{label}"}
    tasks = [{"name": f"task{t}", "data": str(folder / f"task{t}.tsv"), **fields} for t in range(TASKS)]
    config = InstructionsConfig.model_validate({"tasks": tasks, "rows": rows, "held_out": HELD_OUT})
    exam = {"kind": "perplexity", "name": "exam", "data": {"source": str(folder / "exam.jsonl")}}
    made = Instructions(config, StageContext(None, None, evaluations=(PerplexityTask.Config.model_validate(exam),)))
    made.data = made.prepare()
    return made


def check(folder: Path, stats: dict[str, Any], rows: int) -> dict[str, int]:
    """Return how many of the planted rows were left out; stop if one was written, or another one is missing."""
    planted = json.loads((folder / "planted.json").read_text())
    wanted = Counter(planted.values())
    places = [row["place"] for row in read_rows(folder / "out" / "rows.jsonl")]
    if kept := [place for place in places if place in planted]:
        raise SystemExit(f"{len(kept)} planted rows were written, for example {planted[kept[0]]!r} at {kept[0]}")
    if stats["dropped"] != dict(wanted) or len(places) != rows or len(set(places)) != rows:
        raise SystemExit(f"planted: {dict(wanted)}; left out: {stats['dropped']}; {len(places)} rows were written")
    leaks = stats["quality"]["leaks"]
    if leaks["rows"] or sum(leaks["examples"]["exam"].values()) != LEAKS:
        raise SystemExit(f"{leaks['rows']} rows leak, and {leaks['examples']} examples were left out for it")
    return {"near_duplicates": wanted[NEAR_DUPLICATE], "leaks": wanted[LEAKED.format("exam")]}


def timed(times: dict[str, float], name: str) -> None:
    """Add the seconds of each call of a method of InstructionQuality to `times`."""
    method = getattr(InstructionQuality, name)

    def call(*args: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*args)
        finally:
            times[name] = round(times.get(name, 0.0) + time.perf_counter() - began, 1)

    setattr(InstructionQuality, name, call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows to write (1,000,000)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    times: dict[str, float] = {}
    for name in ("drop", "drop_held_out", "measure"):
        timed(times, name)
    with tempfile.TemporaryDirectory(prefix="posttrain-benchmark-") as name:
        folder = Path(name)
        writer = multiprocessing.get_context("spawn").Process(target=write_tables, args=(folder, args.rows))
        writer.start()
        writer.join()
        if writer.exitcode:
            raise SystemExit("the tables could not be written")
        began, busy = time.perf_counter(), time.process_time()
        stats = stage(folder, args.rows).build(folder / "out", folder / "work", seed=0)
        seconds, busy = time.perf_counter() - began, time.process_time() - busy
        memory = peak_memory_mib("cpu") / 1024
        found = check(folder, stats, args.rows)
        size = (folder / "out" / "rows.jsonl").stat().st_size / GIB
    figures = {
        "rows": args.rows,
        "examples": stats["quality"]["duplicates"]["texts"],
        **found,
        "rows_gib": round(size, 2),
    }
    figures |= {"seconds": round(seconds, 1), "processor_seconds": round(busy, 1), "seconds_of": times}
    figures |= {"memory_gib": round(memory, 2), "rows_per_second": round(args.rows / seconds)}
    print(
        f"{figures['examples']:,} examples; {args.rows:,} rows of {size:.2f} GiB in {seconds:.0f} s, of which {times}"
    )
    print(f"left out: all of {found['near_duplicates']:,} near duplicates and {found['leaks']} leaks, and nothing else")
    if args.json:
        write_json(args.json, figures)
    print(f"memory_gib={memory:.2f} rows_per_second={args.rows / seconds:.0f}")


if __name__ == "__main__":
    main()
