"""Items of reasoning-gym: arithmetic with worked answers, family relations, letters, syllogisms.

Where an item comes with a solution, or with what a solution can be written from, the table has a column rationale; each
step of it is computed again, and an item whose steps or answer are wrong is dropped.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from downloads import Downloads, FetchError
from tables import Table

ABOUT = "the Python package reasoning-gym, which makes them (pip install 'posttrain[reasoning]')"
LICENCE = "Apache-2.0"

ITEMS = 1500
"""Of each data set; fewer where they repeat."""
STEP = re.compile(r"(?<![\w.)/*^-])([-\d.][\d.,+*/() x×-]*[\d)])\s*=\s*\$?(-?\d[\d.,]*%?)")
WHOLE = re.compile(r"(?<=\d)\.0(?![\d])")
"""The end of a whole number that is written as 28.0."""
EITHER = set("Kai River Sky Rain Sage Winter Phoenix Nova Atlas Zion Axel Aurora Luna Willow Robin".split())
"""Names of persons of which one can't say if they are a son or a daughter, a husband or a wife."""
STATEMENT = re.compile(r"(All|No|Some) (.+?) are (not )?(.+)")


def make_tables(downloads: Downloads) -> Iterator[Table]:
    """Yield the tables word_problems, sums, legs, families, letters, word_order and syllogisms."""
    yield word_problem_table(items("gsm_symbolic"))
    yield sum_table(items("chain_sum", max_digits=3, max_terms=4))
    yield leg_table(items("leg_counting", max_animals=5))
    yield family_table(items("family_relationships"))
    yield letter_table(items("spell_backward"), items("letter_counting"))
    yield order_table(items("word_sorting", max_words=6))
    yield syllogism_table(items("syllogism", size=3 * ITEMS))


def items(name: str, size: int = ITEMS, **options: Any) -> list[dict[str, Any]]:
    """Return items of a data set. Raises FetchError if reasoning-gym is not installed."""
    from posttrain.core.errors import MissingExtraError
    from posttrain.data.gym_rows import make_items

    try:
        return make_items(name, size, 1, options)
    except MissingExtraError as error:
        raise FetchError(str(error)) from error


def word_problem_table(found: list[dict[str, Any]]) -> Table:
    """Return word problems with their worked answers."""
    table = Table("word_problems", unique=("question",))
    for item in found:
        steps, mark, last = WHOLE.sub("", item["metadata"]["answer_cot"]).partition("\n#### ")
        question = re.sub(r"\s*Give .*?(final )?answer.*$", "", WHOLE.sub("", item["question"]), flags=re.S).strip()
        answer = item["answer"].strip()
        if not mark or not is_number(last) or not is_number(answer) or float(last) != float(answer):
            table.drop("the solution ends with another answer", f"{last.strip()} and {answer}: {question}")
        elif re.search(r"\d\.\d{4}", question):
            table.drop("a number in the question with more than three decimals", question)
        elif wrong := [step for step in STEP.findall(steps) if not is_right(*step)]:
            table.drop("a step is wrong", f"{wrong[0][0]} = {wrong[0][1]}: {steps}")
        elif not re.search(rf"(?<![\d.]){re.escape(answer)}(?!\.?[1-9]|\d)", steps.replace(",", "")):
            table.drop("the answer does not appear in the solution", f"{answer}: {steps}")
        elif float(answer) < 0:
            table.drop("a negative count", question)
        else:
            table.add(question=question, answer=answer, rationale=steps.strip())
    return table


def is_number(text: str) -> bool:
    """Return True for a number with at most two decimals."""
    return re.fullmatch(r"\s*-?\d+(\.\d{1,2})?\s*", text) is not None


def is_right(left: str, right: str) -> bool:
    """Return True if both sides of a step are equal, to the digits that are written; also if the left is no sum."""
    text = re.sub(r"(?<=[\d)])\s*[x×]\s*(?=[\d(])", "*", left.replace(",", ""))
    if right.endswith("%") or re.search(r"x|\d\s+\d|\*\*|//|\)\s*\(|\d\s*\(|\.\d*\.", text):
        return True
    if not re.search(r"\d\)?\s*[-+*/]", text):
        return True
    try:
        value = eval(text, {"__builtins__": {}})  # digits, signs and parentheses alone
    except (SyntaxError, ZeroDivisionError, TypeError):
        return True
    shown = right.replace(",", "").rstrip(".")
    digits = len(shown.partition(".")[2])
    return abs(value - float(shown)) <= 0.5 * 10**-digits + 1e-9


def sum_table(found: list[dict[str, Any]]) -> Table:
    """Return sums with the running total as the rationale."""
    table = Table("sums", unique=("question",))
    for item in found:
        expression = item["metadata"]["expression"]
        first, *rest = re.findall(r"[-+] \d+|^-?\d+", expression)
        total, steps = int(first), []
        for part in rest:
            value = total + int(part.replace(" ", ""))
            steps.append(f"{total} {part} = {value}")
            total = value
        if str(total) != item["answer"]:
            table.drop("the running total is another one", f"{expression} = {item['answer']}, not {total}")
        else:
            table.add(question=f"What is {expression}?", answer=item["answer"], rationale="\n".join(steps))
    return table


def leg_table(found: list[dict[str, Any]]) -> Table:
    """Return counts of legs with the count for each animal as the rationale."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    table = Table("legs", unique=("question",))
    for item in found:
        animals: Mapping[str, int] = item["metadata"]["animals"]
        parts = [(count, plural(name) if count > 1 else name, ANIMALS[name]) for name, count in animals.items()]
        steps = [f"{n} {name} {'have' if n > 1 else 'has'} {n} x {legs} = {n * legs} legs." for n, name, legs in parts]
        numbers = [str(n * legs) for n, _, legs in parts]
        total = sum(n * legs for n, _, legs in parts)
        if str(total) != item["answer"]:
            table.drop("another number than the legs of the animals", f"{animals}: {item['answer']}")
            continue
        if len(numbers) > 1:
            steps.append(f"Together: {' + '.join(numbers)} = {total}.")
        listed = ", ".join(f"{n} {name}" for n, name, _ in parts)
        table.add(question=f"How many legs do these animals have in total: {listed}?", answer=str(total),
                  rationale="\n".join(steps))  # fmt: skip
    return table


def plural(noun: str) -> str:
    """Return the plural of an animal's name, which reasoning-gym writes with an s."""
    if noun in ("deer", "sheep", "shrimp", "jellyfish", "starfish"):
        return noun
    if noun == "woodlouse":
        return "woodlice"
    if noun.endswith("y"):
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "ch", "sh")) else f"{noun}s"


def family_table(found: list[dict[str, Any]]) -> Table:
    """Return descriptions of families (the context) with a question on two of their members."""
    table = Table("families", unique=("context", "question"))
    for item in found:
        context, _, question = item["question"].partition("\n\n")
        question = re.split(r"(?<=[?.]) (Answer|Respond|Reply|Provide|Give)", question.strip())[0]
        if not context or not question:
            table.drop("no question", item["question"])
        elif item["metadata"]["person1"] in EITHER:
            table.drop("a person who may be a man or a woman", question)
        else:
            table.add(context=context, question=question, answer=item["answer"])
    return table


def letter_table(backward: list[dict[str, Any]], counted: list[dict[str, Any]]) -> Table:
    """Return questions on the letters of words and texts."""
    table = Table("letters", unique=("question",))
    for item in backward:
        word = item["metadata"]["word"]
        table.add(kind="backward", question=f'Spell the word "{word}" backward.', answer=word[::-1])
    for item in counted:
        text, letter = " ".join(item["metadata"]["span"]), item["metadata"]["target_letter"]
        if not letter.isalpha():
            table.drop("a digit", text)
        elif text.lower().count(letter.lower()) != text.count(letter):
            table.drop("the letter occurs as a capital too", text)
        else:
            question = f'How often does the letter "{letter}" occur in "{text}"?'
            table.add(kind="count", question=question, answer=str(text.count(letter)))
    return table


def order_table(found: list[dict[str, Any]]) -> Table:
    """Return words in lower case to be sorted."""
    table = Table("word_order", unique=("question",))
    for item in found:
        words = [word.lower() for word in item["metadata"]["original_words"]]
        if len(set(words)) < len(words) or not all(w.isascii() and w.isalpha() for w in words):
            table.drop("a word twice, or other marks than letters", ", ".join(words))
            continue
        down = item["metadata"]["direction"] == "descending"
        order = "reverse alphabetical" if down else "alphabetical"
        table.add(question=f"Put these words into {order} order: {', '.join(words)}",
                  answer=", ".join(sorted(words, reverse=down)))  # fmt: skip
    return table


def syllogism_table(found: list[dict[str, Any]]) -> Table:
    """Return syllogisms whose label holds whether or not the kinds that are named may be empty."""
    table = Table("syllogisms", unique=("premise", "hypothesis"))
    for item in found:
        facts = item["metadata"]
        premises = [facts["premise1"], facts["premise2"]]
        text = f"{premises[0]}. {premises[1]}. -> {facts['conclusion']}: {item['answer']}"
        valid = {follows(premises, facts["conclusion"], exist) for exist in (False, True)}
        if len(valid) > 1:
            table.drop("follows if there are such things, and else not", text)
        elif (item["answer"].strip() == "Yes") not in valid:
            table.drop("labelled wrongly", text)
        else:
            table.add(premise=f"{premises[0]}. {premises[1]}.", hypothesis=f"{facts['conclusion']}.",
                      label="yes" if valid == {True} else "no")  # fmt: skip
    return table


def follows(premises: list[str], conclusion: str, exist: bool) -> bool:
    """Return True if the conclusion holds in every world in which the premises hold.

    A world says which of the combinations of three kinds occur: 2^8 worlds are all there are for these statements.

    Args:
        premises: Statements such as "All cats are whales", "Some cats are not whales".
        conclusion: Such a statement.
        exist: Only worlds in which there is something of each kind count.

    Raises:
        ValueError: A statement of another form.
    """
    parsed = []
    for text in (*premises, conclusion):
        match = STATEMENT.fullmatch(text)
        if match is None:
            raise ValueError(f"expected All, No or Some ... are ..., got {text!r}")
        parsed.append(match.groups())
    kinds = sorted({kind for _, one, _, other in parsed for kind in (one, other)})
    combinations = [frozenset(c) for n in range(len(kinds) + 1) for c in itertools.combinations(kinds, n)]
    for present in itertools.product((False, True), repeat=len(combinations)):
        world = [c for c, occurs in zip(combinations, present, strict=True) if occurs]
        if exist and any(all(kind not in c for c in world) for kind in kinds):
            continue
        holds = [_holds(world, *statement) for statement in parsed]
        if all(holds[:-1]) and not holds[-1]:
            return False
    return True


def _holds(world: list[frozenset[str]], quantifier: str, subject: str, negation: str | None, predicate: str) -> bool:
    ones = [predicate in c for c in world if subject in c]
    if quantifier == "All":
        return all(ones)
    if quantifier == "No":
        return not any(ones)
    return not all(ones) if negation else any(ones)
