"""Upload what a run made to the Hub: the files that would leave are known, checked and shown before any does."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

import posttrain
from posttrain.core.errors import CheckpointError, ModelError, ServerError
from posttrain.core.files import cache_folder, changed_artifacts, is_weights, named_path, read_object
from posttrain.core.hub import hub_unreachable
from posttrain.core.secrets import hide_secrets, hide_values
from posttrain.recipe.parsing import load_recipe
from posttrain.runs.model_card import KINDS, model_card, without_paths

PUSHED_ENDINGS = {*".safetensors .bin .json .jsonl .txt .model .jinja .md .py .yaml".split()}
VOCABULARY_FILES = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "tokenizer.model"}
"""Files in which any word may stand: they are searched for known keys alone."""
LARGEST_TEXT = 16 << 20
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]{0,95}", re.ASCII)


@dataclass
class PushPlan:
    """Hold what would be uploaded.

    Attributes:
        repository: OWNER/NAME.
        files: Path in the repository → the file here, or its content.
        left_out: Files of the folder that are not uploaded.
        notes: What was changed for the upload.
        title: Message of the commit.
    """

    repository: str
    files: dict[str, Path | bytes]
    title: str
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def card(self) -> str:
        """Return the model card."""
        return bytes(self.files["README.md"]).decode()

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file."""
        return {n: f.stat().st_size if isinstance(f, Path) else len(f) for n, f in self.files.items()}


def plan_push(
    run: str, repository: str, stage: str | None = None, what: str = "auto", licence: str | None = None, work: str = ""
) -> PushPlan:
    """Return what `posttrain push` uploads; nothing is sent.

    Args:
        run: Folder of a run.
        repository: OWNER/NAME on the Hub.
        stage: Name of the stage whose result is meant. None: the run's model.
        what: auto: what the run left; adapter: the adapter alone; merged: the whole model.
        licence: Licence of the model, for the card. None: that of the base model.
        work: Folder in which a model that is merged now is written.

    Raises:
        ModelError: There is no such run, stage or adapter, or something must not leave this machine.
        CheckpointError: The files are not what the run wrote.
    """
    if not REPOSITORY.fullmatch(repository):
        raise ModelError(f"{repository!r}: expected a repository of the Hub as OWNER/NAME")
    path = named_path(run)
    if not all((path / name).is_file() for name in ("manifest.json", "recipe.yaml")):
        raise ModelError(f"{run!r} is no run: expected a folder with manifest.json and recipe.yaml, such as runs/sft")
    manifest, recipe = read_object(path / "manifest.json"), load_recipe(path / "recipe.yaml")
    number, folder, final = _result(path, manifest, stage, what)
    below = folder.relative_to(path).as_posix()
    if changed := changed_artifacts(path, f"{below}/"):
        raise CheckpointError(f"{path}: {', '.join(changed[:5])} changed or went missing since the run wrote them")
    if what == "merged" and (folder / "adapter_config.json").is_file():
        folder = _merged(folder, Path(work))
    _check_base(folder)
    name = f"{path.resolve().name}, {manifest['stages'][number]['name']}"
    plan = PushPlan(repository, {}, f"posttrain {posttrain.__version__}: {name}")
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        inside = file.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in PurePosixPath(inside).parts)
        outside = folder.resolve() not in file.resolve().parents  # a link that leads elsewhere
        if hidden or outside or file.suffix not in PUSHED_ENDINGS:
            plan.left_out.append(inside)
        elif inside != "README.md":
            plan.files[inside] = file
    if not any(is_weights(name) for name in plan.files):
        raise ModelError(f"{folder} holds no weights")
    card = model_card(folder, path, recipe, manifest, number, final, licence)
    card = card.replace("`FOLDER` is this folder:\n\n", "").replace("`FOLDER` is this folder. ", "")
    shown = without_paths(yaml.safe_load((path / "recipe.yaml").read_text(encoding="utf-8")))
    text = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=100)
    plan.files |= {"README.md": card.replace("FOLDER", repository).encode(), "recipe.yaml": text.encode()}
    _check_texts(plan, path)
    return plan


def _result(run: Path, manifest: Mapping[str, Any], stage: str | None, what: str) -> tuple[int, Path, bool]:
    """Return (number of the stage, folder of its result, whether the run's figures are about it)."""
    records = manifest.get("stages", [])
    done = {r["name"]: i for i, r in enumerate(records) if r.get("status") == "done" and r.get("makes") in KINDS}
    models = [i for i in done.values() if records[i]["makes"] == "model"]
    if stage is not None and stage not in done:
        raise ModelError(f"{run}: no finished stage {stage!r} made a model; these did: {', '.join(done) or 'none'}")
    if stage is None and not (models and (run / "model").is_dir()):
        raise ModelError(
            f"{run} has no model: the run is {manifest.get('status', 'not finished')}. --stage NAME uploads what a "
            f"finished stage made: {', '.join(done) or 'none has'}"
        )
    number = models[-1] if stage is None else done[stage]
    own = run / "stages" / f"{number}-{records[number]['name']}"
    folder = run / "model" if stage is None else own / records[number]["makes"]
    if what == "adapter" and not (folder / "adapter_config.json").is_file():
        folder = own / "adapter"
        if not folder.is_dir():
            raise ModelError(f"{own.name} of {run} left no adapter: it was trained without adapter: ..., or whole")
    return number, folder, bool(models) and number == models[-1]


def _merged(folder: Path, work: Path) -> Path:
    """Write the model that an adapter makes of its base, in float32; return its folder."""
    import torch

    from posttrain.config import ModelConfig
    from posttrain.models.loading import load_model
    from posttrain.models.saving import write_whole

    hf, tokenizer = load_model(ModelConfig(source=str(folder), device="cpu"), torch.float32)
    target = work / "model"
    write_whole(hf, tokenizer, target, None)
    return target


def _check_base(folder: Path) -> None:
    """Raise ModelError for an adapter whose base nobody else has."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return
    base = str(read_object(file).get("base_model_name_or_path"))
    local = base.startswith(("/", ".", "~")) or base.count("/") > 1 or named_path(base).exists()
    if local and base != "base":
        raise ModelError(
            f"the adapter's base is a folder of this machine ({Path(base).name}), which nobody else can open: push the "
            "whole model with --merged, or train on a base that is on the Hub"
        )


def _check_texts(plan: PushPlan, run: Path) -> None:
    """Replace paths of this machine in texts by the last name in them; raise ModelError for keys."""
    places = {run.resolve().parent, Path.home(), Path.cwd(), cache_folder().resolve(), Path(tempfile.gettempdir())}
    shown = sorted((str(p) for p in places if len(p.parts) > 2), key=len, reverse=True)  # "/root" may be a word
    paths = re.compile("|".join(rf"{re.escape(p)}(?:/[\w.@+-]+)*" for p in shown)) if shown else None
    keys = []
    for name, file in plan.files.items():
        if is_weights(name) or (isinstance(file, Path) and file.stat().st_size > LARGEST_TEXT):
            continue
        text = (file.read_bytes() if isinstance(file, Path) else file).decode("utf-8", errors="surrogateescape")
        hide = hide_values if PurePosixPath(name).name in VOCABULARY_FILES else hide_secrets
        keys += [f"{name}:{i}" for i, line in enumerate(text.splitlines(), 1) if hide(line) != line]
        if paths is not None and PurePosixPath(name).name not in VOCABULARY_FILES:
            text, count = paths.subn(lambda found: Path(found[0]).name, text)
            if count:
                plan.files[name] = text.encode("utf-8", errors="surrogateescape")
                plan.notes.append(f"{name}: {count} paths of this machine are only names there")
    if keys:
        raise ModelError(
            f"nothing is uploaded: what looks like a key or password stands in {', '.join(keys[:5])}"
            f"{' and elsewhere' if len(keys) > 5 else ''}. Take it out of the recipe (api_key_env names a variable) "
            "and of the files; a key that was in a recipe should be replaced"
        )


def upload(plan: PushPlan, public: bool, confirm: Callable[[list[str]], bool]) -> str:
    """Upload a plan's files in one commit and return the address of the commit.

    The repository is made if it is missing, private unless `public`. Weights and settings of another model that are
    there are removed in the same commit: together with these they would be no model.

    Args:
        plan: What to upload.
        public: Everyone may see it.
        confirm: Is given the files that are replaced or removed, and returns whether to go on.

    Raises:
        ServerError: The Hub can't be reached, refuses, or has no token for this.
        ModelError: The repository is public and that is not wanted, or `confirm` returned False.
    """
    if reason := hub_unreachable():
        raise ServerError(f"nothing was uploaded: {reason}")
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError  # HTTPError: of the client that it uses

    api, name = HfApi(endpoint=os.environ.get("HF_ENDPOINT")), plan.repository
    try:
        api.whoami()  # without a token, a private repository would be one that does not exist
        try:
            info = api.model_info(name)
        except RepositoryNotFoundError:
            api.create_repo(name, private=not public)
            info = api.model_info(name)
        else:
            _check_existing(info, plan, public, confirm)
        there = [file.rfilename for file in info.siblings or []]
        operations = [
            CommitOperationAdd(path, file if isinstance(file, bytes) else str(file))
            for path, file in plan.files.items()
        ]
        removed = [CommitOperationDelete(path) for path in _stale(there, plan.files)]
        done = api.create_commit(name, [*operations, *removed], commit_message=plan.title, parent_commit=info.sha)
    except (OSError, ValueError, HTTPError) as error:
        if isinstance(error, ModelError | ServerError):
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        login = ". Log in with: hf auth login (or set HF_TOKEN), with a token that may write"
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        missing = "oken" in first and not refused
        raise ServerError(f"the Hub refused {name}: {first}{login if refused or missing else ''}") from error
    return str(done.commit_url)


def _check_existing(info: Any, plan: PushPlan, public: bool, confirm: Callable[[list[str]], bool]) -> None:
    if not info.private and not public:
        raise ModelError(f"{plan.repository} is public: to upload to it, say so with --public")
    there = [file.rfilename for file in info.siblings or []]
    touched = [f"{path} (replaced)" for path in plan.files if path in there]
    touched += [f"{path} (removed)" for path in _stale(there, plan.files)]
    if touched and not confirm(touched):
        raise ModelError(f"nothing was uploaded: {plan.repository} keeps its files")


def _stale(there: Sequence[str], new: Mapping[str, Any]) -> list[str]:
    """Return files of another model in a repository, which readers would take for part of the new one."""
    settings = ("config.json", "adapter_config.json", "generation_config.json", "chat_template.jinja")
    return [p for p in there if p not in new and (is_weights(p) or p.endswith(".index.json") or p in settings)]
