"""Join a vision tower and a language model by a new projector, into a folder that transformers opens.

LLaVA (arXiv 2304.08485, 2310.03744): vectors of the tower's patches go through a two-layer perceptron into the language
model, in the places of image tokens. Tower and language model keep their weights; the projector's are random, so the
composed model answers texts as the language model does, and images have no meaning to it until it is trained. A tower
of convolutions makes a model of type fast_vlm (arXiv 2412.13303), whose patches are the places of its last map.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.config import ModelConfig, NewToken
from posttrain.core.errors import ModelError
from posttrain.models.loading import load_settings, load_tokenizer, open_model, resolve
from posttrain.models.opening_errors import explained
from posttrain.models.portable_files import finish_folder
from posttrain.models.tiny_model import tiny_model

WITH_CLASS_TOKEN = {"clip_vision_model": True, "siglip_vision_model": False, "vit": True, "dinov2": True}
"""Types of towers, and whether their first vector stands for the whole picture: it is left out."""
CONVOLUTIONS = ("efficientnet",)
"""Types of towers that make a map of vectors by convolutions."""
IMAGE_TOKEN = "<image>"
CHANGED_LOGITS = 1e-3
"""Largest change of a text's logits that rounding may make."""
FLATTEN = (
    "{%- set posttrain_ns = namespace(messages=[], text='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is defined and message['content'] is iterable and message['content'] is not string "
    "and message['content'] is not mapping -%}"
    "{%- set posttrain_ns.text = '' -%}"
    "{%- for part in message['content'] -%}"
    "{%- set posttrain_ns.text = posttrain_ns.text + ('IMAGE' if part['type'] == 'image' else part['text']) -%}"
    "{%- endfor -%}"
    "{%- set posttrain_ns.messages = posttrain_ns.messages + [dict(message, content=posttrain_ns.text)] -%}"
    "{%- else -%}"
    "{%- set posttrain_ns.messages = posttrain_ns.messages + [message] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = posttrain_ns.messages -%}\n"
)
"""Begins a chat template of texts, so that it reads turns in parts: pictures become image tokens in their places."""


@dataclass(frozen=True)
class Tower:
    """Hold a vision tower.

    Attributes:
        model: The tower of transformers.
        image_processor: What makes its pixels of a picture.
        new: Its weights are random.
    """

    model: Any
    image_processor: Any
    new: bool

    @property
    def has_class_token(self) -> bool:
        """Return True if its first vector is no patch."""
        return WITH_CLASS_TOKEN.get(self.model.config.model_type, False)

    @property
    def makes_map(self) -> bool:
        """Return True if it makes a map of vectors, after its last layer alone."""
        return self.model.config.model_type in CONVOLUTIONS

    @property
    def patch_size(self) -> int:
        """Return the pixels of a side that make one vector: of a map, the stem halves the picture, then the strides."""
        config = self.model.config
        return 2 * math.prod(config.strides) if self.makes_map else int(config.patch_size)

    @property
    def tokens(self) -> int:
        """Return the number of vectors of a picture. Raises ModelError if the map has a place that is cut off."""
        size = self.model.config.image_size
        if self.makes_map and size % self.patch_size:
            raise ModelError(
                f"image_size {size}: a tower of type {self.model.config.model_type} needs a multiple of "
                f"{self.patch_size} pixels: change it in config.json, and in preprocessor_config.json alike"
            )
        return int((size // self.patch_size) ** 2)


def compose(tower: str, language: ModelConfig, folder: Path, seed: int = 0, layer: int | None = None) -> dict[str, Any]:
    """Write a model of type llava, or fast_vlm for a tower of convolutions, with its processor.

    Args:
        tower: Folder or Hub name of a vision tower, or `TYPE:SETTING=VALUE,...` for a new one of random weights.
        language: The language model.
        folder: Folder for the model; it must not exist.
        seed: Seed of the projector, and of a new tower.
        layer: Layer of the tower whose vectors are taken. None: the last but one of a trained tower (as LLaVA takes
            it), the last one of a new tower and of convolutions.

    Returns:
        Numbers of what was made: parameters of each part, tokens of an image.

    Raises:
        ModelError: A part can't be opened or does not fit, or the folder exists.
    """
    _check_free(folder)
    settings = {"device": "cpu", "add_tokens": [*language.add_tokens, NewToken(token=IMAGE_TOKEN, special=True)]}
    opened = open_model(language.model_copy(update=settings), torch.float32)
    _check_language(language, opened.hf.config, opened.tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        seeing = open_tower(tower)
        model = _joined(opened.hf, opened.tokenizer, seeing, layer)
    processor = _processor(opened.tokenizer, seeing)
    _check_picture(model, processor, tower)
    folder.mkdir(parents=True)
    model.generation_config = opened.hf.generation_config
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    finish_folder(folder)
    _check_text(folder, opened.hf, language.source)
    parts = {"tower": model.model.vision_tower, "projector": model.model.multi_modal_projector}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return {**counts, "language": sum(p.numel() for p in opened.hf.parameters()), "image_tokens": seeing.tokens}


def plan_composed(tower: str, language: ModelConfig, folder: Path, layer: int | None) -> list[tuple[str, str]]:
    """Return what `compose` would make, as (subject, text) lines; no weights are read or allocated.

    Args:
        tower: As for `compose`, and so the others.
        language: Likewise.
        folder: Likewise.
        layer: Likewise.

    Raises:
        ModelError: What `compose` would end with before it reads weights.
    """
    _check_free(folder)
    settings = load_settings(language)
    tokenizer = load_tokenizer(language.model_copy(update={"add_tokens": [NewToken(token=IMAGE_TOKEN, special=True)]}))
    settings = tiny_model(resolve(language.source).location).config if settings is None else settings
    _check_language(language, settings, tokenizer)
    with torch.device("meta"):
        seeing = open_tower(tower, weights=False)
        model = _empty(settings, tokenizer, seeing, layer)
    counts = [
        sum(p.numel() for p in part.parameters())
        for part in (model.model.vision_tower, model.model.multi_modal_projector, model)
    ]
    kind, size = seeing.model.config.model_type, seeing.model.config.image_size
    return [
        ("tower", f"{tower}: {kind}, {counts[0] / 1e6:,.1f} M parameters{', random' if seeing.new else ''}"),
        ("projector", f"{counts[1] / 1e6:,.1f} M parameters, random"),
        ("image", f"{seeing.tokens} tokens of a picture of {size} x {size} pixels"),
        ("writes", f"{folder}: a model of type {model.config.model_type}, about {4 * counts[2] / 2**20:,.1f} MiB"),
    ]


def _check_free(folder: Path) -> None:
    """Raise ModelError if a folder exists."""
    if folder.exists():
        raise ModelError(f"{folder} exists already: name another folder, or remove it first")


def _check_language(language: ModelConfig, settings: Any, tokenizer: Any) -> None:
    """Raise ModelError unless a language model reads texts alone and has a chat template."""
    if getattr(settings, "vision_config", None) is not None:
        raise ModelError(f"language model {language.source!r} reads images already")
    if not tokenizer.chat_template:
        raise ModelError(f"language model {language.source!r} has no chat template: give one (--chat-template FILE)")


def open_tower(source: str, weights: bool = True) -> Tower:
    """Open a vision tower, or make a new one. Raises ModelError if its type is none that LLaVA takes.

    Args:
        source: See `compose`.
        weights: Read them. Otherwise the tower is made of its configuration alone.
    """
    kind, colon, values = source.partition(":")
    if colon and kind in (*WITH_CLASS_TOKEN, *CONVOLUTIONS):
        return _new_tower(kind, values)
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    location = resolve(source).location
    with explained(source):
        config = AutoConfig.from_pretrained(location)
        config = getattr(config, "vision_config", config)
    if config.model_type not in (*WITH_CLASS_TOKEN, *CONVOLUTIONS):
        raise ModelError(
            f"vision tower {source!r} is of type {config.model_type}, expected one of "
            f"{', '.join((*WITH_CLASS_TOKEN, *CONVOLUTIONS))}, which give a vector for each patch"
        )
    if not weights:
        with explained(source):
            return Tower(AutoModel.from_config(config), AutoImageProcessor.from_pretrained(location), new=False)
    with explained(source):
        model, info = AutoModel.from_pretrained(location, config=config, output_loading_info=True, dtype=torch.float32)
        processor = AutoImageProcessor.from_pretrained(location)
    lost = [name for name in info["missing_keys"] if "pooler" not in name and "head" not in name]
    if lost:
        raise ModelError(f"vision tower {source!r}: its files lack {len(lost)} weights, for example {sorted(lost)[0]}")
    return Tower(model, processor, new=False)


def _new_tower(kind: str, values: str) -> Tower:
    from transformers import CONFIG_MAPPING, AutoModel, CLIPImageProcessor

    settings: dict[str, Any] = {}
    for pair in filter(None, values.split(",")):
        name, equals, value = pair.partition("=")
        try:
            settings[name.strip()] = json.loads(value)
        except ValueError as error:
            raise ModelError(f"vision tower {kind}: {pair!r} is no SETTING=NUMBER, such as image_size=128") from error
    unknown = settings.keys() - set(CONFIG_MAPPING[kind].__dataclass_fields__)
    if unknown:
        raise ModelError(f"vision tower {kind} has no setting {sorted(unknown)[0]!r} (image_size and hidden_size are)")
    try:
        model = AutoModel.from_config(CONFIG_MAPPING[kind](**settings), dtype=torch.float32)
    except Exception as error:  # sizes that do not go together make errors of many kinds
        raise ModelError(f"vision tower {kind}: no tower of these sizes can be made: {error}") from error
    size = model.config.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return Tower(model, processor, new=True)


def _joined(language: Any, tokenizer: Any, tower: Tower, layer: int | None) -> Any:
    """Return the model with the weights of both parts and a new projector."""
    model = _empty(language.config, tokenizer, tower, layer)
    for own, given in ((model.model.language_model, language.model), (model.model.vision_tower, tower.model)):
        own.load_state_dict(given.state_dict())
    if not model.config.tie_word_embeddings:
        model.lm_head.load_state_dict(language.get_output_embeddings().state_dict())
    model.tie_weights()
    return model.eval()


def _empty(language: Any, tokenizer: Any, tower: Tower, layer: int | None) -> Any:
    """Return the model with new weights, by the configurations of both parts."""
    import transformers as hf

    vision = tower.model.config
    settings = {
        "vision_config": vision,
        "text_config": language,
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "image_seq_length": tower.tokens,
        "tie_word_embeddings": bool(language.tie_word_embeddings),
    }
    if tower.makes_map:
        if layer is not None:
            raise ModelError(
                f"layer {layer}: a vision tower of type {vision.model_type} has vectors after its last one"
            )
        vision.hidden_size = vision.hidden_dim  # where the projector looks for it
        return hf.FastVlmForConditionalGeneration(hf.FastVlmConfig(**settings))
    chosen = layer if layer is not None else -1 if tower.new else -2
    if not -vision.num_hidden_layers <= chosen <= vision.num_hidden_layers:
        raise ModelError(f"layer {chosen}: the vision tower has {vision.num_hidden_layers} layers")
    strategy = "default" if tower.has_class_token else "full"
    config = hf.LlavaConfig(**settings, vision_feature_layer=chosen, vision_feature_select_strategy=strategy)
    return hf.LlavaForConditionalGeneration(config)


def _processor(tokenizer: Any, tower: Tower) -> Any:
    from transformers import LlavaProcessor

    template = str(tokenizer.chat_template)
    tokenizer.chat_template = FLATTEN.replace("IMAGE", IMAGE_TOKEN) + template
    return LlavaProcessor(
        tower.image_processor,
        tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy="default" if tower.has_class_token else "full",
        num_additional_image_tokens=int(tower.has_class_token),
        chat_template=tokenizer.chat_template,
        image_token=IMAGE_TOKEN,
    )


@torch.no_grad()
def _check_picture(model: Any, processor: Any, name: str) -> None:
    """Raise ModelError unless a picture has as many vectors as the processor writes tokens for it."""
    from PIL import Image

    inputs = processor(text=[IMAGE_TOKEN], images=[Image.new("RGB", (64, 48), "white")], return_tensors="pt")
    written = int((inputs["input_ids"] == model.config.image_token_id).sum())
    shape = tuple(inputs["pixel_values"].shape[-2:])
    try:
        made = sum(len(part) for part in model.get_image_features(inputs["pixel_values"]).pooler_output)
    except ValueError as error:  # a tower of patches refuses pictures of another size than its own
        raise ModelError(
            f"vision tower {name!r}: its image processor makes pictures of {shape} pixels: {error}"
        ) from error
    if made != written:
        raise ModelError(
            f"vision tower {name!r} makes {made} vectors of a picture of {shape} pixels, and {written} are expected: "
            "its image processor is not the tower's"
        )


@torch.no_grad()
def _check_text(folder: Path, language: Any, name: str) -> None:
    """Raise ModelError unless the folder, opened by transformers, says of a text what the language model says."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.arange(1, 9)[None]
    theirs, ours = (m(input_ids=tokens, use_cache=False).logits for m in (language.eval(), model))
    if float((theirs - ours).abs().max()) > CHANGED_LOGITS * float(theirs.abs().max().clamp_min(1)):
        raise ModelError(
            f"language model {name!r} ({language.config.model_type}): the composed model computes other logits of a "
            "text. Its type does something outside of its decoder; please report it"
        )
