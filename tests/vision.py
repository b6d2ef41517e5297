"""Tiny random models of the types that read images, with processors, and pictures for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from posttrain.models.tiny_model import tiny_tokenizer

MARK = "\ufdd0"
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' %}{{ 'IMAGE' }}{% else %}{{ p['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A template that writes IMAGE for a picture, in the order of the parts."""
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}
CONVOLUTIONS = {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128, "image_size": 64}


def picture(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    """Make a picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def tokenizer_with(*tokens: str, template: str = PARTS, **attributes: str) -> Any:
    """Make the byte-level tokenizer with further special tokens, some of them attributes of it."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    for name, token in attributes.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    tokenizer.chat_template = template
    return tokenizer


def llava() -> tuple[Any, Any]:
    """Make a model and a processor of type llava, of 4 tokens a picture."""
    import transformers as hf

    tokenizer = tokenizer_with("<image>", template=PARTS.replace("IMAGE", "<image>"))
    resize = hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = hf.LlavaProcessor(
        resize, tokenizer, 16, "default", num_additional_image_tokens=1, chat_template=tokenizer.chat_template
    )
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER, projection_dim=16),
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return hf.LlavaForConditionalGeneration(config), processor


def fast_vlm() -> tuple[Any, Any]:
    """Make a model and a processor of type fast_vlm, whose tower is of convolutions, of 4 tokens a picture."""
    import transformers as hf

    tokenizer = tokenizer_with("<image>", template=PARTS.replace("IMAGE", "<image>"))
    resize = hf.EfficientNetImageProcessorPil(size={"height": 64, "width": 64})
    processor = hf.LlavaProcessor(resize, tokenizer, 32, "full", chat_template=tokenizer.chat_template)
    config = hf.FastVlmConfig(
        vision_config=hf.EfficientNetConfig(**CONVOLUTIONS, hidden_size=CONVOLUTIONS["hidden_dim"]),
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return hf.FastVlmForConditionalGeneration(config), processor


def idefics3() -> tuple[Any, Any]:
    """Make a model and a processor of type idefics3, which cuts large pictures into tiles."""
    import transformers as hf

    names = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    tokenizer = tokenizer_with(*names, template=PARTS.replace("IMAGE", "<image>"))
    resize = hf.Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = hf.Idefics3Processor(resize, tokenizer, image_seq_len=1, chat_template=tokenizer.chat_template)
    config = hf.Idefics3Config(
        vision_config=TOWER,
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return hf.Idefics3ForConditionalGeneration(config), processor


def qwen2_vl() -> tuple[Any, Any]:
    """Make a model and a processor of type qwen2_vl, whose pictures have as many tokens as their size needs."""
    import transformers as hf

    names = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
    written = "<|vision_start|><|image_pad|><|vision_end|>"
    tokenizer = tokenizer_with(*names, template=PARTS.replace("IMAGE", written))
    resize = hf.Qwen2VLImageProcessorPil(patch_size=8, size={"shortest_edge": 256, "longest_edge": 4096})

    class ImagesAlone(hf.Qwen2VLProcessor):  # type: ignore[misc, name-defined]
        """A processor without the one for videos, which needs torchvision."""

        def check_argument_for_proper_class(self, name: str, argument: Any) -> None:
            return None

    processor = ImagesAlone(resize, tokenizer, None, chat_template=tokenizer.chat_template)
    tower = {"depth": 2, "embed_dim": 32, "num_heads": 4, "hidden_size": 32, "mlp_ratio": 2, "patch_size": 8}
    keys = ("vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id")
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in zip(keys, names, strict=True)}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {**TEXT, "vocab_size": len(tokenizer), "rope_parameters": rope}
    config = hf.Qwen2VLConfig(vision_config=tower, text_config=text, **ids)
    return hf.Qwen2VLForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    """Make a model and a processor of type gemma3, whose image tokens see each other."""
    import transformers as hf

    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = tokenizer_with(*named.values(), template=PARTS.replace("IMAGE", "<start_of_image>"), **named)
    resize = hf.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    processor = hf.Gemma3Processor(resize, tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template)
    text = {**TEXT, "vocab_size": len(tokenizer), "sliding_window": 16, "query_pre_attn_scalar": 8}
    config = hf.Gemma3Config(
        vision_config={**TOWER, "patch_size": 8},
        text_config={**text, "layer_types": ["sliding_attention", "full_attention"]},
        mm_tokens_per_image=4,
        image_token_index=tokenizer.convert_tokens_to_ids(named["image_token"]),
        boi_token_index=tokenizer.convert_tokens_to_ids(named["boi_token"]),
        eoi_token_index=tokenizer.convert_tokens_to_ids(named["eoi_token"]),
    )
    return hf.Gemma3ForConditionalGeneration(config), processor


MAKERS = {"llava": llava, "fast_vlm": fast_vlm, "idefics3": idefics3, "qwen2_vl": qwen2_vl, "gemma3": gemma3}


def make(kind: str, folder: Path | None = None) -> tuple[Any, Any]:
    """Make a tiny random model of a type and its processor; in a folder too if one is given."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = MAKERS[kind]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # projections that begin at zero would hide the pictures
            if "norm" not in name and parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    model.eval()
    if folder is not None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return model, processor
