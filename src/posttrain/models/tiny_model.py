"""A tiny random model with a byte-level tokenizer of its own: for tests, and to try a recipe in seconds."""

from __future__ import annotations

from typing import Any

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
    """Make a random causal language model of a transformers type: 2 layers, width 32, float32.

    Args:
        model_type: Type of the model.
        vocabulary: Size of the vocabulary.
        seed: Decides the weights.
        changes: Go into the configuration.

    Raises:
        ValueError: The type is unknown (transformers' own).
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if model_type == "gpt2":
        sizes = {
            "vocab_size": vocabulary,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 2048,
            "bos_token_id": 0,
            "eos_token_id": 2,
        }
    elif model_type in ("phi", "phi3"):
        # These derive the head size from the width; phi's rotary part must leave an even size.
        del sizes["head_dim"]
    config = AutoConfig.for_model(model_type, **{**sizes, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
