"""The vision part of a transformers model: vectors of pictures in the places of their tokens in a ragged batch.

transformers' own `get_image_features` runs tower and projector. Each picture of a batch is encoded once, however many
samples show it; what is left for the language part is a ragged batch like any other, with some embeddings given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from posttrain.core.errors import ModelError
from posttrain.core.ragged import BatchImages, RaggedBatch
from posttrain.models.model_types import decoder_of

ROTARY_GRID = ("qwen2_vl", "qwen2_5_vl")
"""Types whose tokens of a picture have rotary positions of time, row and column (arXiv 2409.12191)."""
SEE_EACH_OTHER = ("gemma3",)
"""Types in which the tokens of a picture see those after them in the same picture (arXiv 2503.19786)."""
TYPES = ("llava", "fast_vlm", "idefics3", "smolvlm", *ROTARY_GRID, *SEE_EACH_OTHER)
"""Types whose pictures are computed as transformers computes them, which tests hold for each."""


def image_token(base: Any) -> int | None:
    """Return the id of the tokens that get vectors of pictures; None for a text model."""
    if getattr(base.config, "vision_config", None) is None:
        return None
    found = getattr(base.config, "image_token_id", None)
    return None if found is None else int(found)


def check_images(base: Any) -> None:
    """Raise ModelError for a type with which pictures are not computed."""
    kind = base.config.model_type
    if kind not in TYPES:
        raise ModelError(
            f"{kind}: rows with images are computed for {', '.join(TYPES)}, and not for this type: leave the images "
            "out (data.ignore: [images])"
        )


def check_pictures(batch: RaggedBatch, token: int) -> None:
    """Raise ModelError for a batch with image tokens that have no picture, which would be computed as text.

    Args:
        batch: The batch, on the host.
        token: Id of the image tokens.
    """
    shown = 0 if batch.images is None else len(batch.images.image_T)
    written = int((batch.tokens_T == token).sum())
    if written != shown:
        raise ModelError(
            f"a batch has {written} image tokens and vectors for {shown}: some samples lost their pictures on the way, "
            "or a text spells the image token (data.special_tokens: allow)"
        )


def image_vectors(base: Any, images: BatchImages) -> Tensor:
    """Compute the vectors of all pictures of a batch, end to end: (sum of `images.sizes`, H).

    Args:
        base: The transformers model.
        images: The pictures.

    Raises:
        ModelError: The tower returns more or fewer vectors than the processor wrote tokens.
    """
    check_images(base)
    inputs = [_on_device(base, span.inputs()) for span in images.spans]
    parts = [_flat(base.get_image_features(**some)) for some in _joined(inputs)]
    vectors = torch.cat(parts)
    if len(vectors) != sum(images.sizes):
        raise ModelError(
            f"{base.config.model_type}: the vision tower makes {len(vectors)} vectors of the pictures, and the "
            f"processor wrote {sum(images.sizes)} tokens for them: the processor is not this model's"
        )
    return vectors


def zero_of_pictures(base: Any, images: BatchImages) -> Tensor | None:
    """Return a zero whose gradients are zeros of every parameter that pictures are computed by; None: none is trained.

    FSDP sums the gradients of the same parameters over ranks. So a rank whose pass shows no picture adds this zero to
    its loss, made of a picture that another rank's pass may show.
    """
    language = {id(p) for part in (decoder_of(base), base.get_output_embeddings()) for p in part.parameters()}
    if not any(p.requires_grad for p in base.parameters() if id(p) not in language):
        return None
    return image_vectors(base, images).sum() * 0


def _on_device(base: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parameter = next(base.parameters())
    return {
        name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def _joined(inputs: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return the inputs of all pictures as one call's, or one call's each if their sizes differ."""
    shapes = {tuple(sorted((name, tuple(value.shape[1:])) for name, value in some.items())) for some in inputs}
    if len(shapes) > 1:
        return list(inputs)
    return [{name: torch.cat([some[name] for some in inputs]) for name in inputs[0]}]


def _flat(out: Any) -> Tensor:
    """Return what `get_image_features` returns as (vectors, H)."""
    vectors = getattr(out, "pooler_output", out)
    parts = [vectors] if isinstance(vectors, Tensor) else list(vectors)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def rotary_positions(base: Any, batch: RaggedBatch) -> Tensor:
    """Return the rotary positions of every token, (3, T): of time, row and column in a picture, alike in text.

    Args:
        base: A model of one of the types `ROTARY_GRID`.
        batch: The batch.
    """
    positions = batch.positions_T.expand(3, -1).clone()
    for sample, row in zip(batch.samples, batch.rows, strict=True):
        spans = getattr(sample.tokens, "spans", ())
        if not spans:
            continue
        tokens = batch.tokens_T[row][None]
        kinds = (tokens == spans[0].token).int()
        grids = torch.cat([span.inputs()["image_grid_thw"] for span in spans]).to(tokens.device)
        positions[:, row] = base.model.get_rope_index(tokens, kinds, grids)[0][:, 0]
    return positions
