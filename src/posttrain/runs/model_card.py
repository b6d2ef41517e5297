"""Write the model cards of a run: README.md in every folder that it leaves, for people and for the Hub.

A card says what the model was trained from, through all stages and runs, on which data (names, rows, licences, hashes),
with which settings, with which figures, what was not measured, and how it is opened without posttrain. It holds no
paths of this machine.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

import posttrain
from posttrain.config import Recipe
from posttrain.core.files import read_lines, write_text
from posttrain.recipe.model_sources import ENSEMBLE_FILE
from posttrain.report.formatting import format_score
from posttrain.runs.lineage import LineageStep, Origin, data_licence, trace

log = logging.getLogger("posttrain")
OF_THE_MACHINE = {*"base_url api_key_env systems checkpoint_every keep_checkpoints output track store device".split()}
"""Settings that say nothing about the model."""
_FILES = (".tsv", ".csv", ".json", ".jsonl", ".parquet")
KINDS = {"model": "text-generation", "adapter": "text-generation", "reward_model": "text-classification"}


BEHAVIOUR = {"counterfactual", "refusal", "sycophancy", "rewording", "verbosity"}
"""Kinds of evaluations that measure how a model behaves to people."""
FEW_ITEMS = 100


def write_cards(run: Path, recipe: Recipe, manifest: Mapping[str, Any]) -> None:
    """Write README.md in the folders of all finished stages, and in `run`/model if it is there.

    Args:
        run: Folder of the run.
        recipe: Its recipe.
        manifest: Content of its manifest.
    """
    last = None
    for number, record in enumerate(manifest.get("stages", [])):
        if record.get("status") != "done":
            continue
        folder = run / "stages" / f"{number}-{record['name']}"
        for name in KINDS:
            if (folder / name).is_dir():
                _write(folder / name, run, recipe, manifest, number)
        last = number if record.get("makes") == "model" else last
    if last is not None and (run / "model").is_dir():
        _write(run / "model", run, recipe, manifest, last, final=True)


def _write(
    folder: Path, run: Path, recipe: Recipe, manifest: Mapping[str, Any], number: int, final: bool = False
) -> None:
    try:
        text = model_card(folder, run, recipe, manifest, number, final)
    except (KeyError, IndexError, TypeError, ValueError) as error:  # an old or damaged file must not end a run
        log.warning("no model card for %s: %s: %s", folder, type(error).__name__, error)
        return
    write_text(folder / "README.md", text)


def model_card(
    folder: Path,
    run: Path,
    recipe: Recipe,
    manifest: Mapping[str, Any],
    number: int,
    final: bool,
    licence: str | None = None,
) -> str:
    """Return the model card of a folder.

    Args:
        folder: Folder of a model, an adapter or a reward model; its name is the kind.
        run: Folder of the run.
        recipe: Its recipe.
        manifest: Content of its manifest.
        number: Number of the stage that made it.
        final: The figures of the run are about it.
        licence: Licence of the model. None: that of the model that the lineage begins with.
    """
    figures = _figures(run) if final else []
    steps, origin = trace(run, manifest, number)
    origin = origin if licence is None else replace(origin, licence=licence)
    record = manifest["stages"][number]
    head = yaml.safe_dump(_front(folder, steps, origin), sort_keys=False, allow_unicode=True)
    methods = " → ".join(str(step.record["method"]) for step in steps)
    lines = [
        f"---\n{head}---",
        f"# {run.resolve().name}, {record['name']}",
        f"Trained with posttrain {posttrain.__version__} from **{origin.name}**: {methods}.",
        "## Lineage",
        *_table(
            ("run", "stage", "method", "steps", "tokens", "first step → last"), [_step_row(step, run) for step in steps]
        ),
        "## Data",
        *_table(("stage", "source", "rows", "licence", "SHA-256"), [row for step in steps for row in _data_rows(step)]),
        "## Settings",
        "Of this run's stages, as far as they differ from the defaults:",
        "```yaml\n" + yaml.safe_dump(_stage_settings(recipe, number), sort_keys=False, allow_unicode=True) + "```",
        *(["## Figures", *figures] if figures else []),
        "## Limits",
        "\n".join(f"- {line}" for line in _limits(run, recipe, steps, origin, bool(figures))),
        "## Use",
        *_use(folder, origin, "vocabulary" in record),
        f"Versions of transformers: {record.get('transformers', '4.57 or newer')}.",
    ]
    return "\n\n".join(lines) + "\n"


def _front(folder: Path, steps: Sequence[LineageStep], origin: Origin) -> dict[str, Any]:
    """Return the front matter that the Hub reads."""
    adapter = (folder / "adapter_config.json").is_file()
    front: dict[str, Any] = {"license": origin.licence} if origin.licence else {}
    if origin.hub:
        front |= {"base_model": origin.hub, "base_model_relation": "adapter" if adapter else "finetune"}
    sources = [source for step in steps for data in step.data for source in _sources(data)]
    names = sorted({s for s in sources if s.count("/") == 1 and not s.endswith(_FILES) and ":" not in s})
    front |= {"datasets": names} if names else {}
    library, pipeline = ("peft" if adapter else "transformers"), KINDS[folder.name]
    library = "posttrain" if (folder / ENSEMBLE_FILE).is_file() else library
    tags = ["posttrain", *dict.fromkeys(str(s.record["method"]) for s in steps)]
    return front | {"library_name": library, "pipeline_tag": pipeline, "tags": tags}


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return a Markdown table as one paragraph."""
    if not rows:
        return ["None is recorded."]
    cells = [header, ["---"] * len(header), *rows]
    return ["\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in row) + " |" for row in cells)]


def _step_row(step: LineageStep, run: Path) -> list[Any]:
    record = step.record
    folder = run.parent / step.run if step.run != run.resolve().name else run
    place = Path(str(record.get("to", ""))).parent.name
    metrics = read_lines(folder / "stages" / place / "metrics.jsonl")
    name = next((n for n in ("reward", "loss") if metrics and n in metrics[0]), "loss")
    course = [m[name] for m in metrics if isinstance(m.get(name), int | float) and math.isfinite(m[name])]
    change = f"{name} {course[0]:.4g} → {course[-1]:.4g}" if course else "–"
    tokens = record.get("tokens")
    tokens = f"{tokens:,}" if tokens is not None else "–"
    return [step.run, record["name"], record["method"], record.get("steps", "–"), tokens, change]


def _data_rows(step: LineageStep) -> Iterator[list[Any]]:
    for data in step.data:
        rows = data.get("used", data.get("rows", "–"))
        hashes = data.get("sha256") or {}
        names = list(hashes) or [without_paths(s) for s in _sources(data)]
        for i, name in enumerate(names):
            rights = _rights(data, i, len(names)) or "not recorded"
            yield [data["stage"], without_paths(name), rows if i == 0 else "", rights, f"`{hashes.get(name, '–')}`"]


def _rights(data: Mapping[str, Any], number: int, names: int) -> str | None:
    """Return the licence of one of the named files of a data entry; None if it is unknown."""
    sources = _sources(data)
    return data_licence(sources[number] if len(sources) == names else sources[0] if len(sources) == 1 else "")


def _limits(run: Path, recipe: Recipe, steps: Sequence[LineageStep], origin: Origin, final: bool) -> list[str]:
    """Return what is not known of a model, a sentence each; `final`: its figures are in the card."""
    lines = []
    if not final:
        lines.append("No evaluation compares this model with the one that it was trained from.")
    else:
        lines.append(
            "The figures are of one run. Their intervals are over the items of a task: another seed, other prompts or "
            "another domain can differ by more."
        )
        entries = json.loads((run / "evaluations" / "comparison.json").read_text(encoding="utf-8"))
        few = [f"{entry['task']} ({entry['n']})" for entry in entries if int(entry["n"]) < FEW_ITEMS]
        lines += [f"Tasks of fewer than {FEW_ITEMS} items: {', '.join(few)}."] if few else []
    if not final or not BEHAVIOUR & {str(task.kind) for task in recipe.evaluate}:
        lines.append("Bias, refusals of harmful prompts and other behaviour were not measured.")
    lines.append(f"Limits of {origin.name}, such as its languages and its biases, are limits of this model.")
    named = [(data, list(data.get("sha256") or {}) or _sources(data)) for step in steps for data in step.data]
    unknown = {
        str(without_paths(n)) for data, names in named for i, n in enumerate(names) if not _rights(data, i, len(names))
    }
    if unknown:
        lines.append(f"Licences of these data are not recorded: {', '.join(sorted(unknown))}.")
    return lines + ([] if origin.licence else ["The licence of the base model is not known."])


def _sources(data: Mapping[str, Any]) -> list[str]:
    source = data.get("source", [])
    entries = source if isinstance(source, list) else [source]
    return [str(s.get("source", "")) if isinstance(s, Mapping) else str(s) for s in entries]


def without_paths(value: Any) -> Any:
    """Return settings in which a path of this machine is only the name of its file or folder."""
    if isinstance(value, Mapping):
        return {k: without_paths(v) for k, v in value.items() if k not in OF_THE_MACHINE}
    if isinstance(value, list | tuple):
        return [without_paths(v) for v in value]
    if isinstance(value, str) and "\n" not in value:
        is_path = value.startswith(("/", "~", "./", "../")) or value.endswith(_FILES)
        return Path(value).name if is_path else value
    return value


def _stage_settings(recipe: Recipe, number: int) -> list[dict[str, Any]]:
    """Return the settings of the stages up to one that are not the defaults; rounds repeat the list."""
    stages = recipe.stages[: number + 1]
    return [{"method": s.method, **without_paths(s.model_dump(mode="json", exclude_defaults=True))} for s in stages]


def _figures(run: Path) -> list[str]:
    file = run / "evaluations" / "comparison.json"
    if not file.is_file():
        return []
    rows = []
    for entry in json.loads(file.read_text(encoding="utf-8")):
        metric = _metric(run, entry["task"])
        before, after = (_with_interval(entry[side], metric) for side in ("before", "after"))
        change, low, high = (format_score(entry[k], metric, k == "difference") for k in ("difference", "low", "high"))
        rows.append([entry["task"], metric, entry["n"], before, after, f"{change} [{low}, {high}]"])
    return _table(("task", "measure", "items", "before", "after", "difference, 95% interval"), rows)


def _with_interval(entry: Mapping[str, Any], metric: str) -> str:
    value, low, high = (format_score(entry.get(key), metric) for key in ("value", "low", "high"))
    return value if "low" not in entry else f"{value} [{low}, {high}]"


def _metric(run: Path, task: str) -> str:
    summary = run / "evaluations" / "after" / f"{task}.json"
    return str(json.loads(summary.read_text(encoding="utf-8"))["metric"]) if summary.is_file() else "accuracy"


def _reads_images(folder: Path) -> bool:
    """Return True for a model with a vision part."""
    file = folder / "config.json"
    return file.is_file() and "vision_config" in json.loads(file.read_text(encoding="utf-8"))


def _use(folder: Path, origin: Origin, tokens: bool) -> list[str]:
    """Return how the folder is opened with transformers and peft; `tokens`: the tokenizer got new ones."""
    file = folder / "adapter_config.json"
    if (folder / ENSEMBLE_FILE).is_file():
        return ["`posttrain chat FOLDER` opens it: several models, whose distributions of the next token are pooled."]
    if not file.is_file():
        head, reads_images = folder.name == "reward_model", _reads_images(folder)
        auto = "AutoModelForSequenceClassification" if head else "AutoModelForCausalLM"
        auto = "AutoModelForImageTextToText" if reads_images else auto
        kind, name = ("AutoProcessor", "processor") if reads_images else ("AutoTokenizer", "tokenizer")
        code = [f"from transformers import {auto}, {kind}", ""]
        code += [f'model = {auto}.from_pretrained("FOLDER")', f'{name} = {kind}.from_pretrained("FOLDER")']
        if head and (folder / "chat_template.jinja").is_file():
            code += [
                'turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]',
                'inputs = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)',
                "score = model(**inputs).logits",
            ]
        return ["`FOLDER` is this folder:", "```python\n" + "\n".join(code) + "\n```"]
    settings = json.loads(file.read_text(encoding="utf-8"))
    base, revision = str(settings.get("base_model_name_or_path")), settings.get("revision")
    if str(settings.get("peft_type")).startswith("POSTTRAIN"):
        return [
            f"`posttrain chat FOLDER` opens it, on `{base}`: peft has no place for virtual tokens before an answer."
        ]
    head = folder.name == "reward_model"
    auto = "AutoModelForSequenceClassification" if head else "AutoModelForCausalLM"
    code, note = ["from peft import PeftModel", f"from transformers import {auto}, AutoTokenizer", ""], ""
    opened = f'"{base}"' + (f', revision="{revision}"' if revision else "")
    if base == "base":
        opened, note = '"FOLDER/base"', "The base is in this folder too."
    elif origin.package and base == f"package:{origin.package}":
        code[:0] = ["from importlib.util import find_spec", "from pathlib import Path", ""]
        opened = f'Path(find_spec("{origin.package}").origin).parent, gguf_file="{origin.file}"'
        note = f"The base is the file {origin.file} of the Python package {origin.package}."
    elif base.startswith(("tiny:", "lab:")):
        return [f"The base, `{base}`, is made by posttrain: `posttrain chat FOLDER` opens both."]
    elif base.count("/") > 1 or base.startswith((".", "/")):
        opened = f'"{without_paths(base)}"' if base.startswith(("/", ".")) else opened
        note = "The base is a folder; a relative path is seen from the folder of the run, where this code runs."
    code += [
        f"base = {auto}.from_pretrained({opened}{', num_labels=1' if head else ''})",
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
    ]
    if tokens or settings.get("trainable_token_indices"):
        rows = "max(len(tokenizer), base.get_input_embeddings().num_embeddings)"
        code.append(f"base.resize_token_embeddings({rows})  # tokens were added")
    code.append('model = PeftModel.from_pretrained(base, "FOLDER")')
    return [f"`FOLDER` is this folder. {note}".strip(), "```python\n" + "\n".join(code) + "\n```"]
