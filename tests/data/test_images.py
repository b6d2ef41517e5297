"""Rows with images: every spelling of a picture, its tokens without loss and uncut, the store, a whole SFT run."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor

import posttrain
from posttrain.cli.inspect_rollouts import print_rollouts
from posttrain.config import DataConfig, ModelConfig, SystemsConfig
from posttrain.core.errors import DataError
from posttrain.core.files import read_lines
from posttrain.core.image_tokens import ImageTokens, beginning, image_spans, picture_keys
from posttrain.data import sample_cache
from posttrain.data.bad_rows import BadRow
from posttrain.data.encoding import prompt_tokens
from posttrain.data.image_reader import image_reader, use_processor
from posttrain.data.marked_text import pieces, render_terminal
from posttrain.data.pictures import read_picture
from posttrain.data.preference_rows import prepare_pairs
from posttrain.data.sft_rows import prepare
from posttrain.eval.item_parts import is_validation
from posttrain.methods.sft import SFTConfig
from posttrain.methods.sft_measurement import before_answer
from posttrain.models import language_model
from posttrain.models.loading import load_tokenizer
from posttrain.models.tiny_model import tiny_tokenizer
from posttrain.report.evaluations import answer_cards
from posttrain.sampling.rollout_store import read_rollouts, rollouts_path
from posttrain.trainer.policy import open_policy
from posttrain.trainer.train_step import Learner
from tests import vision

PROCESSOR = vision.make("llava")[1]
TOKENIZER = PROCESSOR.tokenizer
use_processor(TOKENIZER, PROCESSOR)
IMAGE = TOKENIZER.convert_tokens_to_ids("<image>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(4):
        vision.picture(i).save(folder / f"{i}.png")
    return folder


def rows_in(folder: Path, rows: list[dict[str, Any]], name: str = "rows") -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(content: Any, answer: str = "a cat", **columns: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **columns}


TEXT = {"type": "text", "text": "What is it?"}


def test_every_spelling_of_a_picture_makes_the_same_sample(folder: Path) -> None:
    data = base64.b64encode((folder / "0.png").read_bytes()).decode()
    url = f"data:image/png;base64,{data}"
    parts = [
        {"type": "image", "image": "0.png"},
        {"type": "image", "path": str(folder / "0.png")},
        {"type": "image", "url": (folder / "0.png").as_uri()},
        {"type": "image", "base64": data},
        {"type": "image", "image": {"bytes": data}},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "input_image", "image_url": url},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}},
    ]
    rows = [row([part, TEXT]) for part in parts]
    rows += [row([{"type": "image"}, TEXT], images=["0.png"]), row("<image>What is it?", image="0.png")]
    rows += [row("What is it?", images=[url])]
    rows += [{"prompt": "What is it?", "completion": "a cat", "image": "0.png"}]
    rows += [
        {
            "conversations": [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "a cat"}],
            "image": "0.png",
        }
    ]
    source = [rows_in(folder, [one], f"row{i}") for i, one in enumerate(rows)]
    samples = prepare(DataConfig(source=source), TOKENIZER).samples
    theirs = PROCESSOR(
        text=[PROCESSOR.apply_chat_template(row([{"type": "image"}, TEXT])["messages"])], images=[vision.picture(0)]
    )["input_ids"][0]
    turns = prepare(DataConfig(source=source), TOKENIZER).rows[0]
    prompt = prompt_tokens(turns, TOKENIZER, DataConfig(source=""))
    assert prompt == before_answer(samples[0]) and picture_keys(prompt) == picture_keys(samples[0].tokens)
    for sample in samples:
        (span,) = image_spans(sample.tokens)
        assert list(sample.tokens) == theirs[: len(sample.tokens)] and len(theirs) - len(sample.tokens) <= 1
        assert [sample.tokens[i] for i in range(span.start, span.stop)] == [IMAGE] * 4
        assert (
            not any(sample.weights[: span.stop])
            and TOKENIZER.decode([t for t, w in zip(sample.tokens, sample.weights, strict=True) if w])
            == "a cat<|im_end|>"
        )
        torch.testing.assert_close(span.inputs()["pixel_values"], samples[0].tokens.spans[0].inputs()["pixel_values"])
    assert (
        read_picture(vision.picture(0)).open().tobytes()
        == read_picture((folder / "0.png").read_bytes()).open().tobytes()
    )


def test_inspect_shows_pictures_in_place_of_their_tokens(folder: Path) -> None:
    source = rows_in(folder, [row("See <image> and <image>?", images=["0.png", "1.png"])])
    sample = prepare(DataConfig(source=source), TOKENIZER).samples[0]
    plain = render_terminal(sample, TOKENIZER, colours=False).plain
    assert "user\nSee [image 0.png, 40 x 32, 4 tokens] and [image 1.png, 40 x 32, 4 tokens]?<|im_end|>" in plain
    assert plain.endswith("⟦a cat<|im_end|>⟧") and "<image>" not in plain
    shown = render_terminal(sample, TOKENIZER)
    assert shown.plain.count("▀") == 2 * 32 * 13 and "".join(p for p, _ in pieces(sample, TOKENIZER)) in shown.plain
    top = read_picture(folder / "0.png").open().resize((32, 26)).getpixel((0, 0))
    assert f"rgb({','.join(map(str, top))}) on" in str(shown.spans[0].style)


def test_transparent_and_turned_pictures(folder: Path) -> None:
    clear = Image.new("RGBA", (8, 4), (255, 0, 0, 0))
    assert read_picture(clear).open().getpixel((0, 0)) == (255, 255, 255)
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    clear.convert("RGB").save(out, "JPEG", exif=exif)
    assert read_picture(out.getvalue()).open().size == (4, 8)


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (row([{"type": "image"}, TEXT]), "places for 1 images, and the row names 0"),
        (row("<image> or <image>?", images=["0.png"]), "places for 2 images, and the row names 1"),
        (row([{"type": "image", "image": "http://a.b/c.png"}, TEXT]), "Images are not downloaded"),
        (row([{"type": "image", "image": "no.png"}, TEXT]), "can't be read: .*no.png"),
        (row("What?", image="rows.jsonl"), "can't be decoded as an image"),
        (row([{"type": "image", "base64": "%%"}, TEXT]), "no base64"),
        (row([TEXT], [{"type": "image", "image": "0.png"}]), "part of type 'image' that can't be used"),
        ({"text": "abc", "image": "0.png"}, "column 'image' is not supported here"),
    ],
)
def test_pictures_that_cannot_be_used_say_why(folder: Path, one: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(DataConfig(source=rows_in(folder, [one])), TOKENIZER)


def test_a_model_of_text_refuses_images(folder: Path) -> None:
    source = rows_in(folder, [row("What is it?", image="0.png")])
    with pytest.raises(DataError, match="the model takes text alone"):
        prepare(DataConfig(source=source), tiny_tokenizer())
    assert len(prepare(DataConfig(source=source, ignore=["image"]), tiny_tokenizer()).samples) == 1


def test_no_image_is_cut(folder: Path) -> None:
    source = rows_in(folder, [row([{"type": "image", "image": "0.png"}, TEXT], "a cat " * 9)])
    whole = prepare(DataConfig(source=source), TOKENIZER).samples[0]
    (span,) = image_spans(whole.tokens)
    with pytest.raises(DataError, match="too long"):
        prepare(DataConfig(source=source, max_tokens=len(whole) - 1), TOKENIZER)
    with pytest.raises(DataError, match="no image is cut"):
        prepare(DataConfig(source=source, max_tokens=span.stop - 1, on_long="truncate"), TOKENIZER)
    cut = prepare(DataConfig(source=source, max_tokens=len(whole) - 3, on_long="truncate"), TOKENIZER).samples[0]
    assert len(cut) == len(whole) - 3 and cut.tokens.places(image_spans(cut.tokens)[0]) == list(
        range(span.start, span.stop)
    )
    assert beginning(whole.tokens, span.start) == list(whole.tokens[: span.start])


def test_the_cache_gives_back_the_same_pictures(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_cache, "cache_folder", lambda: tmp_path)
    data = base64.b64encode((folder / "1.png").read_bytes()).decode()
    rows = [
        row("<image>And <image>?", images=["0.png", data and f"data:image/png;base64,{data}"]),
        row("What is it?", image="0.png"),
        row("What is it?", image="2.png"),
        row("No picture?", "yes"),
    ]
    data_config = DataConfig(source=rows_in(folder, rows))
    found = []
    for least in (2**40, 0, 0):
        monkeypatch.setattr(sample_cache, "CACHED_FROM", least)
        prepared = prepare(data_config, TOKENIZER)
        assert prepared.samples.repeats == 0  # the second and the third row differ in their pictures alone
        sides = [[is_validation(prepared.rows[i], share / 32) for share in range(1, 32)] for i in (1, 2)]
        assert sides[0] != sides[1]
        found.append(
            [
                (
                    list(s.tokens),
                    list(s.weights),
                    [(p.key, p.start, p.stop, p.inputs()["pixel_values"].tolist()) for p in image_spans(s.tokens)],
                )
                for s in prepared.samples.take([0, 1, 2, 3])
            ]
        )
    assert found[0] == found[1] == found[2] and not isinstance(prepared.samples[3].tokens, ImageTokens)
    pairs = [{"prompt": "What is it?", "chosen": "a cat", "rejected": "a dog", "image": "0.png"}]
    (pair,) = prepare_pairs(DataConfig(source=rows_in(folder, pairs, "pairs")), TOKENIZER).items
    assert len(image_spans(pair.chosen.tokens)) == len(image_spans(pair.rejected.tokens)) == 1
    vision.picture(7).save(folder / "2.png")
    PROCESSOR_CHANGED = prepare(data_config, TOKENIZER).samples
    with pytest.raises((DataError, BadRow), match="has changed"):
        image_reader(TOKENIZER)._kept.clear()
        image_spans(PROCESSOR_CHANGED[2].tokens)[0].inputs()


def test_a_run_trains_on_rows_with_and_without_images(folder: Path, tmp_path: Path) -> None:
    """Colours that only the picture tells are learned, answered in held-out rows, and by the model that is saved."""
    vision.make("llava", tmp_path / "model")
    colours = ["red", "blue"]
    for colour in colours:
        Image.new("RGB", (32, 32), colour).save(folder / f"{colour}.png")
    rows = [row("Which colour?", colours[i % 2], image=f"{colours[i % 2]}.png") for i in range(6)]
    held_out = [row("Which colour is it?", colour, image=f"{colour}.png") for colour in colours]
    source = rows_in(folder, [*rows, row("And now?", "yes")], "train")
    stage = {"method": "sft", "data": {"source": source}, "batch_size": 7, "max_steps": 16, "keep_best": False}
    stage |= {"optimizer": {"lr": 0.01}, "held_out": {"source": rows_in(folder, held_out, "held_out")}}
    asked = {"name": "asked", "kind": "generate", "data": stage["held_out"], "max_new_tokens": 6}
    values = {"name": "vision", "model": {"source": str(tmp_path / "model")}, "stages": [stage], "evaluate": [asked]}
    projector = SFTConfig.model_validate({**stage, "train": ["*multi_modal_projector*"]})
    policy = open_policy(projector, ModelConfig(source=str(tmp_path / "model")), 0)
    assert {n.split(".")[2] for n, p in policy.policy.hf.named_parameters() if p.requires_grad} == {
        "linear_1",
        "linear_2",
    }
    samples, stepped = list(prepare(projector.data, policy.tokenizer).samples), []
    for budget in (1, 4096):  # a row of text alone reaches no parameter of the projector
        again = open_policy(projector, ModelConfig(source=str(tmp_path / "model")), 0).policy
        learner = Learner(again, projector.optimizer, SystemsConfig(tokens_per_micro_batch=budget), 2)
        learner.step(samples)
        stepped.append(again.base.model.multi_modal_projector.linear_1.weight.detach().clone())
        with pytest.warns(UserWarning, match="a step changes nothing"):
            learner.step(samples[-1:])
    torch.testing.assert_close(*stepped)
    assert not torch.equal(stepped[0], policy.policy.base.model.multi_modal_projector.linear_1.weight)
    result = posttrain.run(posttrain.Recipe.model_validate(values), tmp_path / "run")
    measured = json.loads((result.folder / "stages" / "0-sft" / "held_out" / "step-000016.json").read_text())
    assert [a["output"] for a in measured["answers"]] == colours
    page = (result.folder / "report.html").read_text()
    for answer in measured["answers"]:
        (shown,) = answer["images"]
        # in the history of its answers, among the held-out answers side by side, and in the evaluation
        assert shown.startswith("data:image/jpeg;base64,") and page.count(f'<img src="{shown}"') == 3
    assert page.count("Greedy answers to: [image]Which colour is it?") == 2 and "img-src data:" in page
    assert "[image red.png, 32 x 32, 4 tokens]" in page
    items = read_lines(result.folder / "evaluations" / "after" / "asked.jsonl")  # equal texts, different pictures
    assert [(i["output"], i["images"]) for i in items] == [(a["output"], a["images"]) for a in measured["answers"]]
    cards = answer_cards("greedy", [], items)
    assert [c.after for c in cards] == colours and len({c.images for c in cards}) == 2
    saved = AutoModelForImageTextToText.from_pretrained(result.folder / "model")
    processor = AutoProcessor.from_pretrained(result.folder / "model")
    asked = processor.apply_chat_template(row([{"type": "image"}, TEXT])["messages"][:1], add_generation_prompt=True)
    inputs = processor(text=[asked], images=[Image.open(folder / "blue.png")], return_tensors="pt")
    answer = saved.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(answer, skip_special_tokens=True) == "blue"
    card = (result.folder / "model" / "README.md").read_text()
    assert "AutoModelForImageTextToText" in card and "AutoProcessor" in card


def test_completions_of_prompts_with_images(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GRPO: two questions on one image, four completions each; the tower runs once a pass, and the reward is met."""
    vision.make("llava", tmp_path / "model")
    rows = [{"prompt": f"{question}?", "answer": "-", "image": "0.png"} for question in ("Which", "What")]
    passes: list[int] = []
    vectors = language_model.image_vectors
    monkeypatch.setattr(language_model, "image_vectors", lambda b, i: passes.append(len(i.spans)) or vectors(b, i))
    stage = {
        "method": "grpo",
        "problems": {"kind": "rows", "data": {"source": rows_in(folder, rows, "problems")}},
        "rewards": {"terms": [{"kind": "function", "name": "no_a", "function": "no_a", "isolated": False}]},
        "sampler": {"max_tokens": 4, "min_tokens": 4},
        "prompts_per_step": 2,
        "group_size": 4,
        "steps": 2,
        "adapter": {"r": 4},
    }
    recipe = {"name": "see", "model": {"source": str(tmp_path / "model")}, "stages": [stage]}
    seen: list[str] = []

    def no_a(text: str, example: dict[str, Any]) -> float:
        seen.append(example["prompt"])
        return float(sum(map(ord, text)) % 2)

    result = posttrain.run(posttrain.Recipe.model_validate(recipe), tmp_path / "run", rewards={"no_a": no_a})
    adapter = ModelConfig(source=str(result.folder / "stages" / "0-rl" / "adapter"))
    assert image_reader(load_tokenizer(adapter)).token == "<image>"  # it has the processor too
    (kept,) = {tuple(r["images"]) for r in read_rollouts(rollouts_path(result.folder / "stages/0-rl/rollouts", 2))}
    assert len(kept) == 1 and f'<img src="{kept[0]}"' in (result.folder / "report.html").read_text()
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=80)
    print_rollouts(result.folder, terminal, groups=1)
    assert terminal.file.getvalue().count("\N{UPPER HALF BLOCK}") > 100
    steps = read_lines(result.folder / "stages" / "0-rl" / "metrics.jsonl")
    assert len(steps) == 2 and all(s["skipped"] == 0 and s["grad_norm"] > 0 for s in steps)
    assert set(passes) == {1} and len(passes) <= 3 * 2, passes  # sampled, and computed for the step
    assert set(seen) == {"[image]Which?", "[image]What?"} and len(seen) == 16
