"""The reward of verifiable instructions: IFEval's checkers (arXiv 2311.07911), as lm-eval ships them.

A row has `instruction_id_list`, such as ["punctuation:no_comma"], and `kwargs`, the arguments of each.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

from pydantic import Field

from posttrain.config.rewards import RewardTermConfig
from posttrain.core.errors import MissingExtraError, RewardError
from posttrain.rewards.outcome import ExampleRow, Explained, LabelError
from posttrain.rewards.reward import Reward, RewardFunctions

NEEDS_PUNKT = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}
"""Instructions whose checkers divide text by NLTK's Punkt model, which no wheel of nltk contains."""
GET_PUNKT = (
    "python -m nltk.downloader punkt_tab gets it; without a network, NLTK_DATA names a folder that has "
    "tokenizers/punkt_tab (the wheel of llama-index-core has one in llama_index/core/_static/nltk_cache)"
)


class InstructionFollowing(Reward):
    """Return 1 if the completion follows all verifiable instructions of its row, else 0; or the share that it follows.

    strict checks the text as it is. loose checks it also without its first line, its last line, both, and each of these
    without asterisks: an instruction is followed if one of the eight texts follows it (arXiv 2311.07911 section 2.2).
    """

    class Config(RewardTermConfig):
        """1 if all verifiable instructions of the row are followed (IFEval), else 0; extra lm-eval."""

        in_worker: ClassVar[bool] = True
        cut_off_is_wrong: ClassVar[bool] = True
        kind: Literal["ifeval"] = "ifeval"
        mode: Literal["strict", "loose"] = Field(
            "strict", description="loose: also without the first and the last line, and without asterisks."
        )
        credit: Literal["all", "share"] = Field(
            "all", description="all: 1 if every instruction is followed; share: the share of those that are."
        )

    config: Config

    def open(self, functions: RewardFunctions) -> None:
        """Import the checkers."""
        self.checkers = import_checkers()

    def __call__(self, text: str, example: ExampleRow) -> float:
        """Check the instructions. Raises LabelError if the row has none that can be checked."""
        row = verifiable_instructions(example, self.checkers.classes)
        found = (self.checkers.strict if self.config.mode == "strict" else self.checkers.loose)(row, text)
        followed = list(found.follow_instruction_list)
        value = float(all(followed)) if self.config.credit == "all" else sum(followed) / len(followed)
        ignored = [name for name, good in zip(row.instruction_id_list, followed, strict=True) if not good]
        return Explained(value, f"not followed: {', '.join(ignored)}") if ignored else value


@lru_cache(maxsize=1)
def import_checkers() -> SimpleNamespace:
    """Return IFEval's functions `strict` and `loose`, and `classes`, the checker of each instruction.

    Raises:
        MissingExtraError: A package is missing.
    """
    try:
        import langdetect
        import nltk

        download, nltk.download = nltk.download, lambda *_, **__: False  # the import would use the network
        try:
            from lm_eval.tasks.ifeval import utils
            from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
        finally:
            nltk.download = download
    except ImportError as error:
        raise MissingExtraError(
            f"verifiable instructions are checked by lm-eval's functions ({error}): pip install 'posttrain[lm-eval]'"
        ) from error
    langdetect.DetectorFactory.seed = 0  # it draws at random otherwise
    langdetect.detect("It loads its profiles now, which must not count in the first call's time limit.")
    return SimpleNamespace(
        strict=utils.test_instruction_following_strict,
        loose=utils.test_instruction_following_loose,
        classes=dict(INSTRUCTION_DICT),
    )


def verifiable_instructions(example: ExampleRow, classes: Mapping[str, Any]) -> SimpleNamespace:
    """Return the instructions of a row as the checkers take them.

    Args:
        example: The row.
        classes: The checker of each instruction.

    Raises:
        LabelError: There are none, or one is unknown or lacks an argument, in whose place a checker would draw one.
        RewardError: Data that a checker needs is not there.
    """
    names, arguments = (_decoded(example.get(column)) for column in ("instruction_id_list", "kwargs"))
    if not isinstance(names, list | tuple) or not names or not isinstance(arguments, list | tuple):
        raise LabelError(
            "expected the columns instruction_id_list and kwargs, lists of the same length, as IFEval's rows have "
            f"them; the row has {sorted(k for k, v in example.items() if v is not None)}"
        )
    if len(names) != len(arguments):
        raise LabelError(f"{len(names)} instructions in instruction_id_list, and {len(arguments)} entries in kwargs")
    given = []
    for name, values in zip(names, arguments, strict=True):
        if name not in classes:
            raise LabelError(f"no instruction is called {name!r}; there are {', '.join(sorted(classes))}")
        if not isinstance(values, Mapping | None):
            raise LabelError(f"{name}: kwargs has {values!r}, expected a mapping of its arguments")
        # Tables have every argument in every row, empty where it does not belong.
        values = {key: value for key, value in (values or {}).items() if value is not None}
        wanted = set(inspect.signature(classes[name].build_description).parameters) - {"self", "kwargs"}
        if unknown := sorted(values.keys() - wanted):
            raise LabelError(f"{name} has no argument {unknown[0]!r}: expected {', '.join(sorted(wanted)) or 'none'}")
        if missing := sorted(key for key in wanted if not values.get(key)):
            raise LabelError(
                f"{name} needs {', '.join(missing)} in kwargs, not empty and not 0: IFEval's checker would draw it at "
                "random"
            )
        if name in NEEDS_PUNKT and not has_punkt():
            raise RewardError(f"{name} needs NLTK's Punkt model (punkt_tab), which is not installed: {GET_PUNKT}")
        given.append(values)
    prompt = str(example.get("prompt", ""))
    return SimpleNamespace(key=0, instruction_id_list=list(names), kwargs=given, prompt=prompt)


@lru_cache(maxsize=1)
def has_punkt() -> bool:
    """Return True if NLTK's Punkt model is installed."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        return False
    return True


def _decoded(value: Any) -> Any:
    """Return a list that a text table holds as JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
