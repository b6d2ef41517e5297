"""Records what TRL's own code makes of fixed logits, for tests/losses/test_distillation_loss.py.

    pip install 'posttrain[bench]'
    python benchmarks/record_trl_distillation.py        # writes tests/losses/recorded_trl_distillation.json

Losses and gradients of `GKDTrainer.generalized_jsd_loss` on a student's and a teacher's logits, for each weight and
temperature. The tensors come from Python's random, rounded to four digits, and lie in the file.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
import trl
from trl.experimental.gkd import GKDTrainer

POSITIONS, VOCABULARY = 9, 13


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    out = Path(__file__).resolve().parent.parent / "tests" / "losses" / "recorded_trl_distillation.json"
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    r = random.Random(7)
    student, teacher = (
        [[round(r.gauss(0, 2), 4) for _ in range(VOCABULARY)] for _ in range(POSITIONS)] for _ in range(2)
    )
    mask = [float(n % 4 != 1) for n in range(POSITIONS)]
    labels = torch.tensor([[5 if m else -100 for m in mask]])
    cases = []
    for beta in (0.0, 0.1, 0.5, 0.9, 1.0):
        for temperature in (1.0, 2.0):
            z = torch.tensor([student], requires_grad=True)
            loss = GKDTrainer.generalized_jsd_loss(z, torch.tensor([teacher]), labels, beta, temperature)
            loss.backward()
            assert z.grad is not None
            found = {"loss": float(loss), "gradient": z.grad[0].tolist()}
            cases.append({"beta": beta, "temperature": temperature, **found})
    value = {"trl": trl.__version__, "torch": torch.__version__, "student": student, "teacher": teacher}
    args.out.write_text(json.dumps({**value, "mask": mask, "cases": cases}, indent=1) + "\n")
    print(f"{len(cases)} cases in {args.out}")


if __name__ == "__main__":
    main()
