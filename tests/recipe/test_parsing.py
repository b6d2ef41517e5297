"""Reading recipes: overrides at any depth, every mistake named at once with its place and the right key."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from posttrain.config import Config, names
from posttrain.core.errors import RecipeError
from posttrain.core.imports import is_import_path, load_object
from posttrain.recipe.parsing import differences, dump_recipe, load_recipe, shipped
from posttrain.recipe.schema import dotted, settings

SMALL = """\
name: small
model: {source: "tiny:llama"}
stages:
  - data: {source: rows.jsonl}
    optimizer:
      lr: 1e-4
  - name: second.round
    data: {source: rows.jsonl}
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "small.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(path: Path | str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    head, *lines = str(caught.value).split("\n")
    assert f"has {len(lines)} problem{'s' * (len(lines) != 1)}:" in head
    return [line.strip() for line in lines]


def one(path: Path | str, *overrides: str) -> str:
    (line,) = problems(path, *overrides)
    return line


def test_overrides_reach_any_depth_by_index_and_by_name(write) -> None:
    recipe = load_recipe(
        write(SMALL),
        [
            "model.source=tiny:qwen2",
            "stages.0.optimizer.lr=3e-4",
            "stages.sft.batch_size=8",
            "stages.second.round.epochs=2",
            "stages.1.adapter.r=4",
            "stages.1.data.rows=[0, 10]",
            "stages.1.data.rows.1=12",
            "seed=7",
        ],
    )
    first, second = recipe.stages
    assert recipe.model.source == "tiny:qwen2" and recipe.seed == 7
    assert (first.optimizer.lr, first.batch_size) == (3e-4, 8)
    assert second.adapter is not None and second.adapter.r == 4 and first.adapter is None
    assert (second.epochs, second.data.rows) == (2.0, (0, 12))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1e-4", 1e-4), ("1E5", 1e5), ("2.5e+3", 2500.0), (".5", 0.5), ("3", 3.0), ("1e-04", 1e-4)],
)
def test_numbers_of_the_short_form_are_numbers(write, text: str, expected: float) -> None:
    path = write(SMALL.replace("1e-4", text))
    assert load_recipe(path).stages[0].optimizer.lr == expected
    assert load_recipe(write(SMALL), [f"stages.0.optimizer.lr={text}"]).stages[0].optimizer.lr == expected


def test_yes_and_no_are_words(write) -> None:
    task = "evaluate:\n  - {name: t, kind: choice, data: {source: a.tsv}, choices: [yes, no, on, 12:30]}\n"
    recipe = load_recipe(write(SMALL + task))
    assert recipe.evaluate[0].choices == ["yes", "no", "on", "12:30"]


def test_text_settings_take_braces_colons_and_numbers_as_they_are() -> None:
    recipe = load_recipe("quickstart", ["stages.0.data.prompt={text}: good?", "name=12", "stages.0.data.system=null"])
    assert recipe.stages[0].data.prompt == "{text}: good?"
    assert recipe.name == "12"
    assert recipe.stages[0].data.system is None
    quoted = load_recipe("quickstart", ['stages.0.data.prompt="a\\nb"', "stages.0.data.source=[a.tsv, b.tsv]"])
    assert quoted.stages[0].data.prompt == "a\nb" and quoted.stages[0].data.source == ["a.tsv", "b.tsv"]


def test_an_empty_value_switches_off() -> None:
    assert load_recipe("quickstart", ["stages.0.adapter="]).stages[0].adapter is None


def test_settings_that_would_undo_each_other_are_refused() -> None:
    with pytest.raises(RecipeError, match="compile nothing"):
        load_recipe("sft", ["stages.0.systems.compile=true", "stages.0.systems.activation_checkpointing=true"])


def test_settings_of_a_critic_are_refused_without_one() -> None:
    with pytest.raises(RecipeError, match="critic serves advantages gae or your own, and these are grpo"):
        load_recipe("lab", ["stages.rl.critic.lr=1e-4"])
    with pytest.raises(RecipeError, match=r"stages.rl.advantages.gae_lambda .*generalized advantage"):
        load_recipe("lab", ["stages.rl.advantages.gae_lambda=0.9"])
    load_recipe("lab", ["stages.rl.method=ppo", "stages.rl.advantages.gae_lambda=0.9", "stages.rl.critic.lr=1e-4"])


def test_all_problems_are_reported_at_once(write) -> None:
    path = write(
        "name: bad name\nmodel: {source: x, dtyp: auto}\nseed: -1\nseed: -2\n"
        "stages:\n  - batch_size: many\n    data: {source: x}\n    epochs: 0\n"
    )
    found = problems(path, "stages.nope.x=1", "novalue")
    assert len(found) == 8
    assert [p for p in found if p.startswith("model.dtyp") and p.endswith("Did you mean dtype?")]
    assert [p for p in found if p.startswith("seed") and "given twice" in p and "small.yaml:4" in p]
    assert [p for p in found if p.startswith("stages.sft.batch_size") and "small.yaml:6" in p and "'many'" in p]
    assert [p for p in found if p.startswith("stages.sft.epochs") and "small.yaml:8" in p]


def test_a_problem_names_file_and_line_or_the_override(write) -> None:
    path = write(SMALL.replace("lr: 1e-4", "lr: fast"))
    assert one(path).startswith(f"stages.sft.optimizer.lr ({path}:6): expected a number, got 'fast'")
    assert "(override stages.0.optimizer.lr=slow)" in one(write(SMALL), "stages.0.optimizer.lr=slow")
    inside = one(write(SMALL), "stages.0.optimzer.lr=1e-4")  # the misspelt part holds the one that was given
    assert inside.startswith("stages.sft.optimzer (override stages.0.optimzer.lr=1e-4)")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("stages.0.optimizer.learning_rate", "Did you mean lr?"),
        ("stages.0.optimizer.learing_rate", "Did you mean lr?"),
        ("stages.0.learning_rate", "Did you mean stages.sft.optimizer.lr?"),
        ("lr", "Did you mean stages.sft.optimizer.lr?"),
        ("stages.1.lr", "Did you mean stages.second.round.optimizer.lr?"),
        ("stages.0.per_device_train_batch_size", "Did you mean batch_size?"),
        ("stages.0.batchsize", "Did you mean batch_size?"),
        ("stages.0.num_train_epochs", "Did you mean epochs?"),
        ("stages.0.max_seq_length", "Did you mean stages.sft.data.max_tokens?"),
        ("stages.0.data.max_length", "Did you mean max_tokens?"),
        ("model.model_name_or_path", "Did you mean source?"),
        ("stages.0.gradient_accumulation_steps", "systems.tokens_per_micro_batch"),
        ("stages.0.data.soruce", "Did you mean source?"),
        ("qqq", "there are: name, description, model, seed, stages, rounds, evaluate, evaluate_stages, output, track"),
    ],
)
def test_an_unknown_key_gets_the_right_one(write, key: str, hint: str) -> None:
    line = one(write(SMALL), f"{key}=1")
    named = key.replace("stages.0.", "stages.sft.").replace("stages.1.", "stages.second.round.")
    assert line.startswith(f"{named} (override {key}=1)") and "no such setting" in line and hint in line


def all_settings_classes() -> list[type[BaseModel]]:
    for table in vars(names).values():
        for path in table.values() if isinstance(table, dict) else ():
            if isinstance(path, str) and is_import_path(path):
                load_object(path)
    found: list[type[BaseModel]] = [Config]
    for config in found:
        found += config.__subclasses__()
    made = ("posttrain.config.open_functions",)  # parameters of functions, whichever other tests have looked at
    return [c for c in found if c.__module__.startswith("posttrain.") and c.__module__ not in made]


def test_every_alias_leads_to_a_setting_that_exists() -> None:
    ours = {name for config in all_settings_classes() for name in config.model_fields}
    assert {new.rsplit(".", 1)[-1] for new in names.RENAMED.values()} <= ours
    # A name of another tool that is a setting of ours too would be shadowed.
    assert sorted(set(names.RENAMED) & ours) == []


def test_overrides_of_list_items_that_are_not_there(write) -> None:
    assert "stages has no '5'; there is: 0 (sft), 1 (second.round)" in one(write(SMALL), "stages.5.epochs=1")


def test_alternatives_of_one_value_are_one_problem(write) -> None:
    line = one(write(SMALL), "stages.0.adapter.target=3")
    assert line.startswith("stages.sft.adapter.target (") and "'all-linear'" in line and "list" in line


def test_a_mistake_inside_one_alternative_is_one_problem(write) -> None:
    """A source is text or settings: what is wrong in the settings is said, not that they are no text."""
    for wrong, message in (
        (
            "weihgt: 2",
            "weihgt (",
        ),
        ("weight: -1", "weight ("),
    ):
        line = one(write(SMALL), "stages.0.data={source: [a.jsonl, {source: b.jsonl, " + wrong + "}]}")
        assert line.startswith("stages.sft.data.source.1." + message), line


def test_missing_settings_are_named_and_described(write) -> None:
    found = problems(write("name: x\nstages:\n  - {}\n"))
    assert any(p.startswith("model: required") or p.startswith("model (") and "required" in p for p in found)
    assert any(p.startswith("stages.sft.data (") and "required" in p for p in found)


def test_checks_across_settings_keep_their_own_words(write) -> None:
    double = SMALL.replace("name: second.round", "name: sft")
    assert "two stages are named 'sft'" in one(write(double))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "not valid YAML"),
        ("- a\n- b\n", "expected a mapping"),
        ("", "expected a mapping"),
        ("a: &x\n  b: *x\n", "contains itself"),
        ("a: !!python/object:os.system {}\n", "no such setting"),
    ],
)
def test_files_that_are_no_recipe(write, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(text))


def test_a_recipe_that_is_not_there_gets_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match="Did you mean quickstart") as caught:
        load_recipe("recipes/quikstart.yaml")
    listed = str(caught.value).splitlines()[1:]
    assert sorted(" ".join(listed).split()) == sorted(shipped()) and max(map(len, listed)) < 80


def test_merged_anchors(write) -> None:
    path = write(
        SMALL.replace("  - data: {source: rows.jsonl}", "  - data: &d {source: a.tsv, rows: [0, 5]}", 1)
        + "evaluate:\n  - name: t\n    kind: perplexity\n    data:\n      <<: *d\n      rows: [5, 9]\n"
    )
    recipe = load_recipe(path)
    assert recipe.evaluate[0].data.source == "a.tsv" and recipe.evaluate[0].data.rows == (5, 9)
    assert recipe.stages[0].data.rows == (0, 5)


def test_a_recipe_that_extends_another_is_that_one_with_its_own_keys(write, tmp_path) -> None:
    write(SMALL)
    path = write(
        "extends: small.yaml\nname: mine\nmodel: {dtype: float32}\nstages.sft.optimizer: {weight_decay: 0.5}\n"
        "stages.second.round.data.rows: [0, 5]\nstages.1.data: {chat: false}\nevaluate: []\n",
        "mine.yaml",
    )
    mine, small = load_recipe(path), load_recipe(tmp_path / "small.yaml")
    assert (mine.name, mine.model.source, mine.model.dtype) == ("mine", "tiny:llama", "float32")
    assert (mine.stages[0].optimizer.lr, mine.stages[0].optimizer.weight_decay) == (1e-4, 0.5)
    assert mine.stages[1].data.rows == (0, 5) and not mine.stages[1].data.chat
    assert mine.stages[0].data == small.stages[0].data and load_recipe(write(dump_recipe(mine), "x.yaml")) == mine
    path = write(f"extends: {path}\nname: third\nstages: [{{data: {{source: other.jsonl}}}}]\n", "third.yaml")
    third = load_recipe(path, ["model.source=tiny:gpt2"])  # overrides come last; a list is replaced as a whole
    assert (len(third.stages), third.model.source, third.model.dtype) == (1, "tiny:gpt2", "float32")
    assert load_recipe(write("extends: quickstart\nname: q\n", "q.yaml")).stages == load_recipe("quickstart").stages


def test_what_is_wrong_in_a_recipe_that_extends_another_is_told_with_its_place(write) -> None:
    write(SMALL.replace("lr: 1e-4", "lr: fast"))
    path = write("extends: small.yaml\nname: mine\nstages.sft: {batchsize: 3}\nstages.nope.x: 1\n", "mine.yaml")
    found = problems(path)
    assert len(found) == 3 and "stages.nope.x" in found[0] and "there is: 0 (sft), 1 (second.round)" in found[0]
    assert [p for p in found if p.startswith("stages.sft.batchsize") and "mine.yaml:3" in p and "batch_size" in p]
    assert [p for p in found if p.startswith("stages.sft.optimizer.lr") and "small.yaml:6" in p]
    for text, message in (
        ("extends: [small.yaml]\nname: a\n", "name or path of one recipe"),
        ("extends: a.yaml\nname: a\n", "extends itself: .*a.yaml extends .*a.yaml"),
        ("extends: smal.yaml\nname: a\n", "no recipe 'smal.yaml': no such file"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(write(text, "a.yaml"))


def test_data_beside_the_recipe_is_found_and_the_working_directory_wins(write, tmp_path, monkeypatch) -> None:
    path = write(SMALL)
    assert load_recipe(path).stages[0].data.source == "rows.jsonl"  # nowhere: left for the loader to complain about
    (tmp_path / "rows.jsonl").write_text("")
    assert load_recipe(path).stages[0].data.source == str(tmp_path / "rows.jsonl")
    here = tmp_path / "here"
    here.mkdir()
    (here / "rows.jsonl").write_text("")
    monkeypatch.chdir(here)
    assert load_recipe(path).stages[0].data.source == "rows.jsonl"


@pytest.mark.parametrize("name", ["1e-4", "12", "on", "null", "true", "0x10", "1_0", "-"])
def test_what_is_dumped_reads_back_equal(write, name: str) -> None:
    recipe = load_recipe("quickstart", [f'stages.0.data.prompt="{name}"', "stages.0.data.system=a: {b} # c"])
    assert load_recipe(write(dump_recipe(recipe), "again.yaml")) == recipe


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_recipes_are_valid_named_after_their_file_and_described(name: str, write) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description
    assert load_recipe(write(dump_recipe(recipe))) == recipe


def test_quickstart_holds_out_rows_of_the_same_instructions() -> None:
    recipe = load_recipe("quickstart")
    train, held = recipe.stages[0].data, recipe.evaluate[0].data
    assert train.rows is not None and held.rows is not None
    assert train.rows[1] <= held.rows[0] and held.rows[1] - held.rows[0] >= 400
    assert train.model_copy(update={"rows": None}) == held.model_copy(update={"rows": None})


def test_a_run_folder_stands_for_its_recipe(write, tmp_path) -> None:
    recipe = load_recipe("quickstart")
    write(dump_recipe(recipe), "recipe.yaml")
    assert load_recipe(tmp_path) == recipe == load_recipe(str(tmp_path))


def test_differences_name_what_computes_otherwise() -> None:
    a = load_recipe("quickstart")
    b = load_recipe("quickstart", ["stages.0.batch_size=8", "output=elsewhere", "track.wandb=x", "description=d"])
    assert differences(a, a) == []
    assert differences(a, b) == ["stages.sft.batch_size: 16 there, 8 now"]
    c = load_recipe("quickstart", ["stages.0.adapter="])
    (line,) = differences(a, c)
    assert line.startswith("stages.sft.adapter: {'kind': 'lora'") and line.endswith("there, None now")


def test_settings_list_every_leaf_of_a_recipe() -> None:
    def leaves(value, key: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
        if isinstance(value, dict):
            return {k for name, inner in value.items() for k in leaves(inner, (*key, name))}
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return {k for i, inner in enumerate(value) for k in leaves(inner, (*key, i))}
        return {key}

    for name in shipped():
        data = load_recipe(name).model_dump(mode="json")
        by_key = {s.key: s for s in settings(data)}
        free = ("columns", "options", "engine_args", "scale")  # mappings with keys of the user's
        assert {k for k in leaves(data) if not set(free) & set(k)} <= set(by_key), name
    data = load_recipe("quickstart").model_dump(mode="json")
    by_key = {dotted(s.key, data): s for s in settings(data)}
    lr = by_key["stages.sft.optimizer.lr"]
    assert (lr.default, lr.type, lr.description) == ("2e-05", "number", "Peak learning rate.")
    assert by_key["model.source"].default == "required"
    kinds = "choice | generate | perplexity | sample | refine | score | speed"
    kinds += " | ifeval | lm_eval | counterfactual | refusal | sycophancy | rewording | verbosity"
    assert by_key["evaluate.sentiment.kind"].type == kinds
    assert by_key["stages.sft.adapter"].block and by_key["stages.sft.adapter.r"].type == "integer"


def test_defaults_are_those_of_the_block_that_holds_them() -> None:
    data = load_recipe("dpo").model_dump(mode="json")
    by_key = {dotted(s.key, data): s for s in settings(data)}
    assert by_key["stages.dpo.optimizer.lr"].default == "1e-06"


def test_stages_of_one_method_get_names_that_differ(write) -> None:
    path = write(SMALL.replace("  - name: second.round\n    data", "  - data"))
    recipe = load_recipe(path, ["stages.sft-2.epochs=3"])
    assert [stage.name for stage in recipe.stages] == ["sft", "sft-2"] and recipe.stages[1].epochs == 3
    assert load_recipe(write(dump_recipe(recipe), "again.yaml")) == recipe


def test_wrong_values_are_told_once_in_plain_words(write) -> None:
    assert one(write(SMALL), "stages.sft.optimizer.lr=1e-4x") == (
        "stages.sft.optimizer.lr (override stages.sft.optimizer.lr=1e-4x): expected a number"
    )
    small = SMALL.replace("lr: 1e-4", "lr: -1")
    assert one(write(small)).endswith("small.yaml:6): expected more than 0, got -1")
    assert one(write(SMALL), "stages.sft.batch_size=0").endswith("expected at least 1")
    assert one(write(SMALL), "stages.sft.merge=maybe").endswith("expected true or false")
    schedule = one(write(SMALL), "stages.sft.optimizer.schedule=cos")
    assert schedule.endswith("expected 'constant', 'linear', 'cosine' or 'wsd'")
    assert one(write(SMALL), "stages.sft.optimizer=3").endswith("expected a mapping of settings")


@pytest.mark.parametrize(
    ("override", "nearest"), [("stages.sft.method=dpo2", "dpo"), ("evaluate.0.kind=generat", "generate")]
)
def test_an_unknown_method_or_kind_gets_the_nearest_names(override: str, nearest: str) -> None:
    recipe = "sft" if override.startswith("stages") else "quickstart"
    line = one(recipe, override)
    assert "Did you mean" in line and nearest in line.split("Did you mean")[1] and len(line) < 600
    assert "does not match any of the expected tags" not in line


def test_modules_beside_the_recipe_and_in_the_current_folder_can_be_imported(write, tmp_path, monkeypatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "module_beside_a_recipe.py").write_text("def reward(text, example): return 1.0\n")
    (here / "module_in_the_current_folder.py").write_text("def reward(text, example): return 2.0\n")
    monkeypatch.chdir(here)
    load_recipe(write(SMALL))
    assert load_object("module_beside_a_recipe:reward")("", {}) == 1.0
    assert load_object("module_in_the_current_folder:reward")("", {}) == 2.0


def test_a_run_remembers_the_folders_of_its_modules(write, tmp_path, monkeypatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "module_of_a_run.py").write_text("def reward(text, example): return 3.0\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    write(SMALL, "recipe.yaml")
    write(json.dumps({"import_folders": [str(tmp_path / "elsewhere")]}), "manifest.json")
    load_recipe(tmp_path)
    assert load_object("module_of_a_run:reward")("", {}) == 3.0
