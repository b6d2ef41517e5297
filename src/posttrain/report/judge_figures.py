"""Show what stages of feedback found, on the page and in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.core.files import read_object
from posttrain.report.formatting import format_fixed, format_seconds
from posttrain.report.load import numbered_folders, read_json

Fact = tuple[str, str, str, Any]
"""(name, value as text, interval as text, the number)."""


def read_feedback(run: Path, notes: list[str] | None = None) -> list[dict[str, Any]]:
    """Return name, judge and raters of every stage that left judge.json or raters.json, in order."""
    found, unread = [], [] if notes is None else notes
    for folder in numbered_folders(run / "stages"):
        files = {part: read_json(folder / f"{part}.json", unread) for part in ("judge", "raters")}
        entry = {part: content for part, content in files.items() if content is not None}
        if entry:
            judge = entry.get("judge") or {}
            entry |= {"stage": folder.name.split("-", 1)[1], "facts": judge_facts(judge), "who": who_judged(judge)}
            entry |= {
                "cost": describe_cost(judge.get("cost") or {}),
                "agreement": describe_agreement(entry.get("raters") or {}),
            }
            found.append(entry)
    return found


def judge_facts(judge: Mapping[str, Any]) -> list[Fact]:
    """Return the judge's numbers, each with its interval."""
    people, length, position = (judge.get(k) or {} for k in ("people", "length", "position"))
    certainty = people.get("by_certainty") or {}
    shares = [
        ("agrees with people", people.get("agreement")),
        ("kappa", people.get("kappa")),
        *((f"agrees where people are in the {name}", value) for name, value in certainty.items()),
        ("agrees, prompted in one order only", people.get("one_order")),
        ("one person agrees with people", people.get("one_person")),
        ("same verdict in both orders", judge.get("consistency")),
        ("prefers the first answer", position.get("first")),
        ("probability of the first answer", position.get("mean_probability")),
        ("prefers the longer answer", length.get("longer")),
        ("people prefer the longer answer", length.get("longer_by_people")),
        ("correlation of label and length", length.get("correlation")),
        ("probability on the labels", judge.get("mass")),
        ("mean probability of the chosen", judge.get("strength")),
    ]
    out: list[Fact] = []
    for name, value in shares:
        if isinstance(value, Mapping) and value.get("value") is not None:
            low, high = (format_fixed(float(value[k]), 3) for k in ("low", "high"))
            found = format_fixed(float(value["value"]), 3)
            out.append((name, found, f"{low} to {high}, n = {value['n']:,}", value["value"]))
        elif isinstance(value, int | float):
            out.append((name, format_fixed(value, 3, name.startswith("correlation")), "", value))
    if judge.get("scores"):
        s = judge["scores"]
        span = f"{format_fixed(s['least'], 2)} to {format_fixed(s['most'], 2)}"
        out.append(("mean score", format_fixed(s["mean"], 2), span, s["mean"]))
    return out


def who_judged(judge: Mapping[str, Any]) -> str:
    """Return a sentence on who judged what."""
    if not judge:
        return ""
    about = judge.get("judge") or {}
    how = "compared in both orders" if about.get("mode") == "pairwise" else "scored one by one"
    where = f" at {about['base_url']}" if about.get("base_url") else ""
    reason = ", after a rationale" if about.get("rationale") else ""
    return (
        f"{about.get('model', 'The judge')}{where} {how}{reason}: {judge.get('judged', 0):,} of "
        f"{judge.get('pairs', 0):,} pairs labelled, {judge.get('ties', 0):,} ties."
    )


def describe_cost(spent: Mapping[str, Any]) -> str:
    """Return a sentence on questions, tokens, time, and retries."""
    if not spent:
        return ""
    parts = [
        f"{spent['questions']:,} questions, {spent['from_store']:,} of them from the store",
        f"{spent['prompt_tokens']:,} prompt tokens and {spent['completion_tokens']:,} completion tokens "
        f"({spent['new_prompt_tokens']:,} and {spent['new_completion_tokens']:,} of them in this run)",
        f"{format_seconds(spent.get('answer_seconds', spent['seconds']))} to answer in total "
        f"({format_seconds(spent['seconds'])} in this run)",
    ]
    if "requests" in spent:
        again = ", ".join(f"{n:,} {why}" for why, n in (spent.get("retries") or {}).items())
        parts.append(f"{spent['requests']:,} requests" + (f", repeated after {again}" if again else ""))
    return "; ".join(parts) + "."


def describe_agreement(raters: Mapping[str, Any]) -> str:
    """Return a sentence on how far people agree."""
    alpha = raters.get("alpha")
    if not alpha:
        return ""
    values = ", ".join(f"{format_fixed(a, 3)} ({name})" for name, a in alpha.items() if a is not None)
    units = f"{raters['units']:,} answers with {raters['ratings_per_unit']:.1f} ratings each"
    return f"Krippendorff's alpha between people is {values or 'not defined: all ratings are equal'}, over {units}."


def judge_warnings(stage: Path) -> list[str]:
    """Return warnings about a stage's judge, to be read before its labels are used."""
    path = stage / "judge.json"
    return list(read_object(path).get("warnings") or []) if path.exists() else []


def feedback_lines(run: Path, disagreements: int = 0) -> list[str]:
    """Return lines for the terminal: who judged, the numbers, warnings, and some disagreements."""
    out: list[str] = []
    for entry in read_feedback(run):
        out.append(f"feedback of stage {entry['stage']}")
        judge = entry.get("judge") or {}
        out += [f"  {text}" for text in (entry["agreement"], entry["who"], entry["cost"]) if text]
        out += [f"  {name:<48} {value:>7}  {span}".rstrip() for name, value, span, _ in entry["facts"]]
        out += [f"  ! {w}" for w in judge.get("warnings") or []]
        out += [
            f"  no label: {u['source']}: {u['why']}" for u in (judge.get("unlabelled") or [])[: max(3, disagreements)]
        ]
        out += [
            f"  skipped: {u['source']}: {u['reason']}"
            for u in (judge.get("answers_left_out_shown") or [])[: max(3, disagreements)]
        ]
        for d in (judge.get("disagreements") or [])[:disagreements]:
            people = "" if d["people"] is None else f", people {d['people']:.2f}"
            out += ["", f"  {d['source']}: judge {d['judge']:.2f}{people} for the first of"]
            out += [f"    {d['a']}", f"    {d['b']}", *(f"    rationale: {r}" for r in d["rationales"])]
    return out
