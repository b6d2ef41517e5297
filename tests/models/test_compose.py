"""A composed model: texts as the language model, images through tower and projector, opened by transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from posttrain.config import ModelConfig
from posttrain.core.errors import ModelError
from posttrain.core.image_tokens import image_spans
from posttrain.models.compose import compose
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import load_model
from posttrain.models.verification import own_attention
from tests import vision
from tests.models.test_vision import sample, their_logprobs

SMALL = "hidden_size=32,intermediate_size=64,num_hidden_layers=2,num_attention_heads=4,image_size=32,patch_size=16"


MAP = ",".join(f"{name}={value}" for name, value in vision.CONVOLUTIONS.items())


@pytest.mark.parametrize("kind", ["siglip_vision_model", "vit", "folder", "efficientnet"])
def test_a_composed_model_is_opened_and_computes_images(kind: str, tmp_path: Path) -> None:
    tower = f"{kind}:{MAP if kind == 'efficientnet' else SMALL}"
    if kind == "folder":
        tower = str(tmp_path / "tower")
        made = CLIPVisionModel(CLIPVisionConfig(**vision.TOWER, projection_dim=16))
        made.save_pretrained(tower)
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tower)
    language = ModelConfig(source="tiny:llama", device="cpu")
    width = vision.CONVOLUTIONS["hidden_dim"] if kind == "efficientnet" else 32
    about = compose(tower, language, tmp_path / "model")
    assert about["image_tokens"] == 4 and about["projector"] == 32 * width + 32 * 32 + 64
    hf, tokenizer = load_model(ModelConfig(source=str(tmp_path / "model"), device="cpu"))
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    if kind == "folder":
        for name, weight in made.state_dict().items():
            assert torch.equal(hf.model.vision_tower.state_dict()[name], weight), name
    row = sample(tokenizer, f"{vision.MARK}What is it?", "a cat", vision.picture(3))
    (span,) = image_spans(row.tokens)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    written = processor(text=[text], images=[vision.picture(3)])["input_ids"][0]
    assert list(row.tokens)[: len(written)] == written and span.stop - span.start == 4
    model = LanguageModel(hf)
    batch = model.pack([row])
    ours = model(batch, "logprobs", batch.rows[0][1:])[0]
    with own_attention(model):
        torch.testing.assert_close(ours, their_logprobs(model, processor, row), rtol=1e-4, atol=1e-4)
    plain, _ = load_model(language)
    tokens = torch.arange(3, 12)[None]
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        texts = [m(input_ids=tokens, use_cache=False).logits[..., :259] for m in (plain, opened)]
    torch.testing.assert_close(*texts, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_composed_says_why(tmp_path: Path) -> None:
    language = ModelConfig(source="tiny:llama", device="cpu")
    for tower, message in (
        ("vit:hidden=3", "no setting 'hidden'"),
        ("vit:image_size=big", "is no SETTING=NUMBER"),
        (f"clip_vision_model:{SMALL},num_attention_heads=5", "no tower of these sizes"),
        ("tiny:llama", "vision tower|can't be opened"),
        (f"efficientnet:{MAP},image_size=80", "80: a tower of type efficientnet needs a multiple of 32"),
    ):
        with pytest.raises(ModelError, match=message):
            compose(tower, language, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(ModelError, match="has 2 layers"):
        compose(f"vit:{SMALL}", language, tmp_path / "model", layer=-4)
    (tmp_path / "there").mkdir()
    with pytest.raises(ModelError, match="exists already"):
        compose(f"vit:{SMALL}", language, tmp_path / "there")
