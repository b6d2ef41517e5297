"""Adapters by name behind one server: each name answers as its merged model does, whoever else is asked meanwhile."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from posttrain.cli.serve import named_adapters
from posttrain.config import ModelConfig, SamplingConfig
from posttrain.core.errors import PosttrainError
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import load_model
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request
from posttrain.sampling.served_adapters import find_served
from posttrain.serving.open_model import open_adapters
from tests.sampling.test_engine import spread
from tests.serving.test_server import TEMPLATE, Running

SHARED = "A long beginning that all of these prompts have in common, and that is computed once: "
PROMPTS = ["x", *(SHARED + end for end in ("one", "two", "and three"))]
KINDS: dict[str, dict[str, Any]] = {
    "some": {"r": 3, "alpha_pattern": {"layers.1.self_attn.v_proj": 9}, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 4, "use_rslora": True, "target_modules": "all-linear"},
}


def write_adapter(folder: Path, base: str, seed: int, **settings: Any) -> Path:
    """Write an adapter that changes answers, as peft does."""
    hf = spread(tiny_model("llama"))
    hf.name_or_path = base
    adapted = get_peft_model(hf, LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    for p in adapted.parameters():
        if p.requires_grad:
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two adapters; one of them has a chat template, which the base has not, and ends at another token."""
    root = tmp_path_factory.mktemp("served")
    hf, tokenizer = spread(tiny_model("llama")), tiny_tokenizer()
    tokenizer.chat_template = None
    hf.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for i, (name, settings) in enumerate(KINDS.items()):
        write_adapter(root / name, str(root / "base"), i, **settings)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root / "all")
    hf.generation_config.eos_token_id = [2, 77]
    hf.generation_config.save_pretrained(root / "all")
    return root


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    """A server whose steps without adapters have few shapes, as on a GPU; those with adapters have their own."""
    config = ModelConfig(source=str(folder / "base"))
    hf, tokenizer = load_model(config, inference=True)
    r = Running(LocalSampler(LanguageModel(hf).eval(), tokenizer, max_running=16, static_shapes=True))
    api, sources = r.server.base, {name: str(folder / name) for name in KINDS}
    r.server.models |= {a.name: a for a in open_adapters(api, config, sources, find_served(config, sources))}
    yield r
    r.close()


def merged(source: Path, requests: list[Request]) -> list[str]:
    hf, tokenizer = load_model(ModelConfig(source=str(source)), inference=True)
    s = LocalSampler(LanguageModel(hf).eval(), tokenizer)
    return [g.rollouts[0].text for g in s.sample(requests, SamplingConfig(temperature=0, max_tokens=16))]


def test_each_name_answers_as_its_merged_model(running: Running, folder: Path) -> None:
    """Interleaved, streamed or not, with common beginnings; then the base alone again, with its fused layers."""
    names, tokenizer = {"tiny": "base", "some": "some", "all": "all"}, running.batcher.sampler.tokenizer
    requests = [Request(tokenizer(text)["input_ids"]) for text in PROMPTS]
    expected = {name: merged(folder / place, requests) for name, place in names.items()}
    assert all(len({expected[name][i] for name in names}) == 3 for i in range(len(PROMPTS)))  # adapters matter

    def ask(job: tuple[str, str]) -> str:
        name, text = job
        options: Any = {"model": name, "prompt": text, "temperature": 0, "max_tokens": 16}
        if len(text) % 2:
            return "".join(c.choices[0].text for c in running.client.completions.create(stream=True, **options))
        answer = running.client.completions.create(**options)
        assert answer.model == name
        return answer.choices[0].text

    jobs = [(name, text) for text in PROMPTS for name in names] * 2
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(ask, jobs))
    for (name, text), answer in zip(jobs, answers, strict=True):
        assert answer == expected[name][PROMPTS.index(text)], (name, text)
    assert ask(("tiny", "x")) == expected["tiny"][0] and not running.batcher.adapters.hooks


def test_names_templates_and_ends_are_the_adapter_s(running: Running, folder: Path) -> None:
    listed = {m.id: m.to_dict().get("parent") for m in running.client.models.list()}
    assert listed == {"tiny": None, "some": "tiny", "all": "tiny"}
    assert running.client.models.retrieve("all").id == "all"
    with pytest.raises(openai.NotFoundError, match="has the models 'tiny', 'some', 'all'"):
        running.client.completions.create(model="other", prompt="a")
    create = running.client.chat.completions.create
    turns: Any = [{"role": "user", "content": "Hi"}]
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        create(model="some", messages=turns)
    answer = create(model="all", messages=turns, temperature=0, max_tokens=16)
    _, tokenizer = load_model(ModelConfig(source=str(folder / "all")))
    prompt = tokenizer(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))["input_ids"]
    assert [answer.choices[0].message.content] == merged(folder / "all", [Request(prompt)])
    assert 77 in running.server.models["all"].adapter.ends and 77 not in running.batcher.sampler.ends  # type: ignore[union-attr]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, r"expected plain LoRA .* found use_dora: True\. Merge it"),
    "rows": ({"trainable_token_indices": [5]}, r"found trainable_token_indices"),
    "head": ({"target_modules": ["lm_head"]}, r"found base_model\.model\.lm_head.* Merge it"),
}


@pytest.mark.parametrize("wrong", [*WRONG, "shapes", "half", "base", "whole", "vocabulary", "missing"])
def test_an_adapter_that_can_not_be_served_says_why(wrong: str, running: Running, folder: Path, tmp_path: Path) -> None:
    config, source = ModelConfig(source=str(folder / "base")), tmp_path / wrong
    settings, message = WRONG.get(wrong, ({}, ""))
    if wrong == "whole":
        source, message = folder / "base", "holds a whole model"
    elif wrong != "missing":
        target = {"target_modules": ["q_proj"], "r": 2}
        write_adapter(source, str(folder / "base"), 0, **(target | settings))
    own = source / "adapter_config.json"
    if wrong == "base":
        own.write_text(json.dumps(json.loads(own.read_text()) | {"base_model_name_or_path": "a/b"}))
        message = r"belongs to the model a/b, and .* is served\. Serve its own base"
    elif wrong == "vocabulary":
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["<new>"])
        tokenizer.save_pretrained(source)
        message = "its vocabulary differs .* 1 tokens more"
    elif wrong == "shapes":
        hf = get_peft_model(tiny_model("llama", hidden_size=64), LoraConfig(r=2, target_modules=["q_proj"]))
        hf.save_pretrained(tmp_path / "other")
        shutil.copy(tmp_path / "other" / "adapter_model.safetensors", source)
        message = "does not fit its base .*q_proj it has 64 inputs and 32 outputs, and the base has 32"
    elif wrong == "half":
        file = source / "adapter_model.safetensors"
        save_file({name: t for name, t in load_file(file).items() if "lora_B" in name}, file)
        message = "expected A and B of linear layers, found .*lora_B"
    elif wrong == "missing":
        message = "there is no such folder"
    with pytest.raises(PosttrainError, match=message):
        sources = {"x": str(source)}
        open_adapters(running.server.base, config, sources, find_served(config, sources))


def test_an_adapter_of_a_run_is_named_by_its_folder(folder: Path, tmp_path: Path) -> None:
    """The run merged it into its model, and kept it beside."""
    for place in ("stages/0-sft/model", "model"):
        (tmp_path / "run" / place).mkdir(parents=True)
    shutil.copytree(folder / "some", tmp_path / "run" / "stages" / "0-sft" / "adapter")
    (tmp_path / "run" / "manifest.json").write_text("{}")
    found = find_served(ModelConfig(source=str(folder / "base")), {"x": str(tmp_path / "run")})
    assert Path(found["x"].location) == tmp_path / "run" / "stages" / "0-sft" / "adapter"
    for given in (["x"], ["=a"], ["x=a", "x=b"], ["tiny=a"]):
        with pytest.raises(PosttrainError, match="expected NAME=SOURCE|is taken"):
            named_adapters(given, "tiny")
