"""Print the table of model types in docs/models.md, from tiny random models: what posttrain does with each type.

    python tools/model_table.py                 # every causal type of transformers (two minutes)
    python tools/model_table.py llama bloom     # some of them
    python tools/model_table.py --write         # put the whole table into docs/models.md

A type is made small, checked against its own forward pass (`verify`), sampled from, and its samples are compared with
the forward pass of training. Each row is what was measured.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DOCS = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- made by tools/model_table.py -->", "<!-- end of what tools/model_table.py makes -->"
PROMPT = [5, 9, 12, 7, 30]


@dataclass(frozen=True)
class Row:
    """Hold what was found out about a type.

    Attributes:
        kind: Model type.
        batches: How it is computed: "ragged", "one at a time", "refused" or "not made".
        why: Reason of any but the first.
        samples: The sampler draws from it, and the log-probabilities are those of the forward pass.
        fused: Parts that are computed by kernels of posttrain on a CPU.
    """

    kind: str
    batches: str
    why: str = ""
    samples: bool = False
    fused: tuple[str, ...] = ()

    def cells(self) -> str:
        """Return the row of the table."""
        draws = "yes" if self.samples else "no"
        return f"| {self.kind} | {self.batches} | {draws} | {', '.join(self.fused) or '-'} |"


def causal_types() -> list[str]:
    """Return the model types of which transformers has a causal language model."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING))


def measure(kind: str) -> Row:
    """Find out what posttrain does with a model type."""
    from posttrain.core.errors import ModelError
    from posttrain.models.language_model import LanguageModel
    from posttrain.models.tiny_model import tiny_model
    from posttrain.models.verification import verify

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            hf = tiny_model(kind)
        except ModelError as error:
            return Row(kind, "not made", str(error))
        try:
            model = LanguageModel(hf)
            verify(model)
        except ModelError as error:
            return Row(kind, "refused", str(error).removeprefix(f"{kind}: "))
    said = [str(w.message) for w in caught if "can't be shared" in str(w.message)]
    if not model.ragged:
        reason = said[-1].split("shared (", 1)[1].split(");", 1)[0] if said else ""
        return Row(kind, "one at a time", reason, False, fused_parts(model))
    samples = samples_right(model)
    return Row(kind, "ragged", "", samples, fused_parts(model))


def samples_right(model: Any) -> bool:
    """Draw a few completions and compare their log-probabilities with those of the forward pass of training."""
    from posttrain.config import SamplingConfig
    from posttrain.core.types import Sample
    from posttrain.models.tiny_model import tiny_tokenizer
    from posttrain.sampling.engine import LocalSampler
    from posttrain.sampling.protocol import Request

    group = LocalSampler(model, tiny_tokenizer()).sample([Request(PROMPT, 3, 0)], SamplingConfig(max_tokens=5))[0]
    for rollout in group.rollouts:
        weights = [0.0] * len(PROMPT) + [1.0] * len(rollout.tokens)
        found = model(model.pack([Sample([*PROMPT, *rollout.tokens], weights)]))[0].detach()
        if float((found - torch.tensor(rollout.logprobs)).abs().max()) > 1e-3:
            return False
    return True


def fused_parts(model: Any) -> tuple[str, ...]:
    """Return which kinds of modules have a forward pass of posttrain: norms, MLPs, whole layers of a decoding step."""
    own = [m for m in model.modules() if "forward" in vars(m)]
    names = {type(m).__name__ for m in own if not isinstance(m, torch.nn.Linear | torch.nn.Embedding)}
    parts = {
        "norms": any("Norm" in n for n in names),
        "MLPs": any("MLP" in n or "FeedForward" in n for n in names),
        "decoding layers": any(getattr(m, "in_one_call", None) is True for m in own),
    }
    return tuple(part for part, there in parts.items() if there)


def table(rows: Sequence[Row]) -> str:
    """Return the Markdown of the table and of what is not in it."""
    shown = [r for r in rows if r.batches in ("ragged", "one at a time")]
    lines = ["| type | batches | sampler, RL | fused on a CPU |", "|---|---|---|---|", *(r.cells() for r in shown)]
    refused = sorted(r.kind for r in rows if r.batches == "refused")
    absent = sorted(r.kind for r in rows if r.batches == "not made")
    count = {b: sum(r.batches == b for r in rows) for b in ("ragged", "one at a time")}
    import transformers

    lines += [
        "",
        *wrapped(
            f"Measured with transformers {transformers.__version__}. {count['ragged']} types are ragged, "
            f"{count['one at a time']} are computed one at a time."
        ),
        *wrapped(f"Refused when they are opened, each with a sentence: {', '.join(refused) or 'none'}."),
        *wrapped(f"Not tried, because no small model of them could be made: {', '.join(absent) or 'none'}."),
    ]
    return "\n".join(lines)


def wrapped(text: str) -> list[str]:
    """Return lines of at most 100 columns."""
    import textwrap

    return textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types (default: all)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    options = parser.parse_args(arguments)
    rows = []
    for kind in options.types or causal_types():
        rows.append(measure(kind))
        print(f"{kind}: {rows[-1].batches} {rows[-1].why}".rstrip(), file=sys.stderr, flush=True)
    text = table(rows)
    if not options.write:
        print(text)
        return 0
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    DOCS.write_text(f"{before}{BEGIN}\n{text}\n\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
