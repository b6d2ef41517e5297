"""Write the pages of the documentation that are made from the code: every setting, and every recipe.

`python tools/reference_pages.py` writes docs/settings.md and docs/recipes.md; tests/test_docs.py holds them equal.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic import BaseModel

from posttrain.cli.recipes import recipes_by_task
from posttrain.config import Recipe
from posttrain.config.open_kinds import OpenKind
from posttrain.recipe.parsing import load_recipe, shipped
from posttrain.recipe.schema import SettingInfo, open_kind_of, settings, type_text

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
METHOD_PAGES = {
    "sft": "sft.md", "pretrain": "domain-adaptation.md", "distill": "distillation.md", "prune": "pruning.md",
    "reward_model": "reward-models.md", "process_reward": "reward-models.md", "rejection_sampling": "r1.md",
    "refine": "constitutional.md", "corrections": "refine-training.md", "feedback": "feedback.md",
    "self_instruct": "self-instruct.md", "instructions": "instructions.md", "quantize": "quantization.md",
    "merge": "merging.md", "RLConfig": "policy-gradients.md", "PreferenceConfig": "preference.md",
    "online_dpo": "preference.md",
}  # fmt: skip
"""Page of each method, by its name or by the name of the settings class that several methods share."""
GROUPS = {
    "method": "Methods", "evaluation": "Evaluations", "source of prompts": "Problems", "reward": "Rewards",
    "environment": "Environments", "source of feedback": "Sources of feedback",
}  # fmt: skip
"""Headings of the open kinds that have a chapter; the other kinds share one."""
OTHER_KINDS = "Names of functions"


@dataclass
class Section:
    """Settings of one class.

    Attributes:
        title: Heading; its anchor is the same in lower case with hyphens.
        model: The settings class.
        names: Names that select it, if it is of an open kind.
        about: First paragraph of the docstring of the class, or of the function that has the settings.
    """

    title: str
    model: type[BaseModel]
    names: list[str] = field(default_factory=list)
    about: str = ""


class Reference:
    """All settings classes that a recipe can have, each with its place on the page.

    Attributes:
        chapters: Sections by heading, in the order of the page.
    """

    def __init__(self) -> None:
        self.places: dict[type[BaseModel], Section] = {}
        self.kinds: dict[str, OpenKind] = {}
        names = ("Recipe", "Shared by several methods or kinds", *GROUPS.values(), OTHER_KINDS, "Blocks")
        self.chapters: dict[str, list[Section]] = {name: [] for name in names}
        self._add(Recipe, "Recipe", Section("Recipe", Recipe, about=first_paragraph(Recipe)))

    def _add(self, model: type[BaseModel], chapter: str, section: Section) -> None:
        self.places[model] = section
        self.chapters[chapter].append(section)
        for parent in parents(model):
            if parent not in self.places:
                shared = Section(parent.__name__, parent, about=first_paragraph(parent))
                self._add(parent, "Shared by several methods or kinds", shared)
        for info in model.model_fields.values():
            self._follow(info.rebuild_annotation())

    def _follow(self, annotation: Any) -> None:
        """Add what an annotation leads to: the kinds of an open kind, or blocks of settings."""
        for kind in kinds_in(annotation):
            if kind.noun not in self.kinds:
                self.kinds[kind.noun] = kind
                for name in kind.names:
                    self._add_kind(kind, name)
        for one in [annotation, *walk(annotation)]:
            if isinstance(one, type) and issubclass(one, BaseModel) and one not in self.places:
                self._add(one, "Blocks", Section(one.__name__, one, about=first_paragraph(one)))

    def _add_kind(self, kind: OpenKind, name: str) -> None:
        model = kind.settings_class(name)
        if model in self.places:
            self.places[model].names.append(name)
        else:
            about = first_paragraph(model) or first_paragraph(kind.load(name))
            section = Section(f"{kind.noun} {name}", model, [name], about)
            self._add(model, GROUPS.get(kind.noun, OTHER_KINDS), section)

    def link(self, annotation: Any) -> str:
        """Return a type in words, with links to the sections of its settings."""
        kinds = list(kinds_in(annotation))
        text = plain_type(annotation)
        if kinds:
            links = [f"[{kind.noun}](#{slug(GROUPS.get(kind.noun, OTHER_KINDS))})" for kind in kinds]
        else:
            found = [one for one in walk(annotation) if isinstance(one, type) and one in self.places]
            links = [f"[{m.__name__}](#{slug(self.places[m].title)})" for m in dict.fromkeys(found)]
        return text.replace("settings", " or ".join(dict.fromkeys(links)), 1) if links else text


def first_paragraph(described: Any) -> str:
    """Return the first paragraph of a docstring in one line, without the double backticks of code."""
    return " ".join((described.__doc__ or "").split("\n\n")[0].split()).replace("``", "`")


def walk(annotation: Any) -> Iterator[Any]:
    """Yield the parts of an annotation, at any depth."""
    for part in get_args(annotation):
        yield part
        yield from walk(part)
    if isinstance(annotation, type):
        yield annotation


def kinds_in(annotation: Any) -> Iterator[OpenKind]:
    """Yield the open kinds in an annotation, at any depth."""
    found = (open_kind_of(one) for one in [annotation, *walk(annotation)] if get_origin(one) is Annotated)
    yield from dict.fromkeys(kind for kind in found if kind is not None)


def plain_type(annotation: Any) -> str:
    """Return a type in words without signs that a table or a link would read."""
    text = type_text(annotation).replace(" | ", " or ").replace(", …]", "]")
    return re.sub(r"\[([^\]\[]*)\]", lambda m: f"list of {m[1]}", text)


def parents(model: type[BaseModel]) -> list[type[BaseModel]]:
    """Return the settings classes that a class extends, without those that have no setting."""
    bases = [base for base in model.__mro__[1:] if isinstance(base, type) and issubclass(base, BaseModel)]
    return [base for base in bases if own_fields(base)]


def own_fields(model: type[BaseModel]) -> list[str]:
    """Return the settings that a class adds or changes, without the one that holds its name."""
    inherited: dict[str, Any] = {}
    for base in reversed([b for b in model.__mro__[1:] if isinstance(b, type) and issubclass(b, BaseModel)]):
        inherited |= base.model_fields
    out = []
    for name, info in model.model_fields.items():
        old = inherited.get(name)
        same = old is not None and repr(old) == repr(info)
        if not same and not (name in ("kind", "method", "name") and info.description is None):
            out.append(name)
    return out


def slug(title: str) -> str:
    """Return the anchor of a heading, as GitHub and the site make it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def cell(text: str) -> str:
    """Return text that a cell of a table can hold, in one line."""
    text = re.sub(r"([\\|*<>])" if "`" not in text else r"([|])", r"\\\1", " ".join(text.split()))
    return re.sub(r"\b(docs/([\w-]+\.md))", r"[\2](\2)", text)


def settings_page() -> str:
    """Return the page of every setting."""
    reference = Reference()
    out = [SETTINGS_HEAD]
    for chapter, sections in reference.chapters.items():
        out.append(f"## {chapter}\n")
        out += [_section(section, reference) for section in sections]
    return "\n".join(out)


def _section(section: Section, reference: Reference) -> str:
    model = section.model
    lines = [f"### {section.title}"] if section.title != "Recipe" else []
    lines += [*_wrapped(section.about), ""] if section.about else []
    page = next((METHOD_PAGES[n] for n in (model.__name__, *section.names) if n in METHOD_PAGES), None)
    if len(section.names) > 1:
        lines += [*_wrapped("Names: " + ", ".join(f"`{name}`" for name in section.names) + "."), ""]
    if page and section.title.startswith("method "):
        lines += [f"Page: [{page.removesuffix('.md')}]({page})", ""]
    bases = [f"[{b.__name__}](#{slug(reference.places[b].title)})" for b in parents(model)]
    lines += [f"Also those of {', '.join(bases)}.", ""] if bases else []
    own = own_fields(model)
    if own:
        lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
        infos: Mapping[str, SettingInfo] = {str(i.key[0]): i for i in settings(model=model) if len(i.key) == 1}
        for name in own:
            info, annotation = infos[name], model.model_fields[name].rebuild_annotation()
            default = f"`{info.default}`" if info.default and info.default != "required" else info.default
            default = default.replace("|", "\\|")
            blocks = [one for one in walk(annotation) if isinstance(one, type) and issubclass(one, BaseModel)]
            meaning = info.description or next((first_paragraph(one) for one in blocks), "")
            lines.append(f"| `{name}` | {reference.link(annotation)} | {default} | {cell(meaning)} |")
        lines.append("")
    elif not bases:
        lines += ["No settings.", ""]
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)


SETTINGS_HEAD = """\
# Every setting

A recipe is a mapping of the settings below. `KEY=VALUE` on the command line changes any of them, by
its dotted key: `stages.sft.optimizer.lr=1e-4`. `posttrain recipes show NAME --fields` prints those
that one recipe can have. A section lists the settings that it adds to those of the sections that it
names; where both have a setting, the section's own holds.

This page is made from the code by `python tools/reference_pages.py`.
"""


def recipes_page() -> str:
    """Return the page of the shipped recipes, grouped by what they are for."""
    files = shipped()
    texts = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    out = [RECIPES_HEAD]
    for heading, names in recipes_by_task({name: yaml.safe_load(text) for name, text in texts.items()}).items():
        out += [f"## {heading}", ""]
        for name in names:
            out += [*_recipe(name, texts[name]), ""]
    return "\n".join(out)


def _recipe(name: str, text: str) -> list[str]:
    data = yaml.safe_load(text)
    recipe = load_recipe(name)
    lines = [f"### {name}", *_wrapped(recipe.description), ""]
    if isinstance(data.get("model"), dict):
        lines.append(f"- **Model:** `{recipe.model.source}`")
    for stage in recipe.stages:
        kind = type(stage).__name__
        page = METHOD_PAGES.get(stage.method) or METHOD_PAGES.get(kind)
        method = f"[{stage.method}]({page})" if page else stage.method
        lines.append(f"- **Stage** `{stage.name}`: {method}")
    if recipe.evaluate:
        named = ", ".join(f"`{task.name}` ({task.kind})" for task in recipe.evaluate)
        lines += _item(f"**Evaluations:** {named}")
    if name in RESULTS:
        page, words = RESULTS[name]
        lines += _item(f"**Measured:** {words} ([{Path(page).stem}]({page}))")
    command = re.search(rf"posttrain run {name}\b.*", text)
    lines += ["", "```", command[0].rstrip() if command else f"posttrain run {name}", "```"]
    return lines


def _item(text: str) -> list[str]:
    first, *rest = _wrapped(text)
    return [f"- {first}", *(f"  {line}" for line in rest)]


RESULTS = {
    "quickstart": ("../README.md", "accuracy on 373 held-out reviews 0.772 before, 0.874 after, in nine minutes"),
    "lab": ("experiments/lab.md", "held-out sums right 0.133 before, 0.990 after (GRPO, seed 0)"),
    "grpo": ("experiments/grpo-smollm2.md", "held-out sums right 0.088 before, 0.452 after 100 steps"),
    "grpo_words": ("experiments/grpo-smollm2.md", "held-out problems right 0.105 before, 1.000 after, nine minutes"),
    "calculator": ("experiments/calculator.md", "held-out sums right 10.5% before RL, 95.7% after 40 steps"),
    "online_dpo": ("experiments/online-dpo.md", "held-out sums right 13.1% before, 89.6% after"),
    "r1": ("experiments/r1.md", "sums, one sample: 0.277 before, 0.910 after; other tasks get worse, 0.668 to 0.509"),
    "r1_words": ("experiments/r1-words.md", "other wordings 0.00 before, 0.74 and 0.78 after the chain (two seeds)"),
    "r1_zero": ("experiments/r1-zero.md", "held-out sums right 0.14 before, 0.87 after 60 steps, 0.94 at step 40"),
    "reft": ("experiments/reft.md", "one sample 0.275 before, 0.417 after the warm-up, 0.638 after PPO"),
    "instruct": ("experiments/instruct.md", "short answers 0.007 before, 0.276 after; the unseen cluster is unchanged"),
    "process_reward": ("experiments/reward-models.md", "step accuracy 0.910, AUC 0.959"),
    "rlhf_lab": ("experiments/rlhf-lab.md", "gold score +0.42 [−0.06, 0.90] over three seeds"),
    "rlaif_lab": ("experiments/rlhf-lab.md", "gold score +0.53 [0.27, 0.78] over three seeds"),
    "rlhf_sentiment": ("experiments/rlhf-smollm2.md", "held-out judge 0.711 before, 0.832 after (seed 0)"),
    "rlaif_sentiment": ("experiments/rlhf-smollm2.md", "held-out judge 0.711 before, 0.809 after (seed 0)"),
    "constitutional": ("experiments/constitutional.md", "short complete answers 0.281 before, 0.797 after"),
    "refine_programs": ("experiments/refine-programs.md", "right 40.6% at first, 77.1% after two revisions by tests"),
    "refine_tuned": ("experiments/refine-training.md", "revisions right 55.9% before, 89.8% after stage 1"),
    "compress": ("experiments/compress.md", "538 MB to 74 MB; accuracy 0.882 after fine-tuning, 0.839 at the end"),
    "vision": ("experiments/vision-smollm2.md", "kinds of unseen things 0.219 before, 0.708 after"),
    "behaviour": ("experiments/behaviour.md", "figures of SmolLM2-135M-Instruct"),
}
"""Page with the measurement of a recipe, and its figures in words; tests/test_docs.py looks for them on the page."""
RECIPES_HEAD = """\
# Recipes

`posttrain run NAME` carries out a recipe of the package, `posttrain recipes copy NAME` writes it to
a file that you can change, and `KEY=VALUE` changes a setting. `posttrain memory NAME` prints what
it takes before it runs. Measured results are one run each unless noted, with intervals,
hardware and limits on the page that they name.

This page is made from the code by `python tools/reference_pages.py`.
"""


def main() -> None:
    """Write both pages."""
    for name, text in (("settings.md", settings_page()), ("recipes.md", recipes_page())):
        path = DOCS / name
        path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
        print(f"wrote {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
