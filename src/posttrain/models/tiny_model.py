"""A tiny random model with a byte-level tokenizer of its own: for tests, and to try a recipe in seconds."""

from __future__ import annotations

import difflib
from typing import Any

from posttrain.core.errors import ModelError
from posttrain.models.tiny_sizes import tiny_settings

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tiny_tokenizer() -> Any:
    """Make a byte-level tokenizer (256 bytes, three special tokens) with a ChatML template; it reproduces any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(model_type: str, vocabulary: int = 259, seed: int = 0, **changes: Any) -> Any:
    """Make a random causal language model of a transformers type: two layers (more if it has more kinds), float32.

    Args:
        model_type: Type of the model.
        vocabulary: Size of the vocabulary.
        seed: Decides the weights.
        changes: Go into the configuration.

    Raises:
        ModelError: The type is unknown, or a tiny model of it can't be made; with the nearest names.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING))
    if model_type not in known:
        near = difflib.get_close_matches(model_type, known, 5, 0.5)
        what = "has no causal language model" if model_type in CONFIG_MAPPING else "is no model type of transformers"
        raise ModelError(
            f"tiny:{model_type}: {model_type!r} {what}"
            f"{'; did you mean ' + ' or '.join('tiny:' + n for n in near) + '?' if near else ' (tiny:llama is one)'}"
        )
    try:
        config = CONFIG_MAPPING[model_type](**tiny_settings(CONFIG_MAPPING[model_type], vocabulary, changes))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:
        last = str(error).strip().splitlines()[-1].strip() if str(error).strip() else ""
        raise ModelError(
            f"tiny:{model_type}: no small model of this type could be made ({type(error).__name__}: {last}); give a "
            "folder with a config.json instead"
        ) from error
