"""The similarity filter of Self-Instruct: a new task against all that are kept, ours beside pairwise rouge-score.

    pip install rouge-score
    python benchmarks/self_instruct.py                 # 50,000 kept tasks

The reference implementation of Self-Instruct compares a new task with each kept one by rouge-score's ROUGE-L. Texts
are runs of 6 to 20 words of the packaged movie reviews. The peer is timed on part of the kept texts (its time is
proportional to their number); both must find the same highest score there. The last line is `speed=`: the peer's time
over ours.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

from common import median, write_json

from posttrain.data.readers import packaged_or_own
from posttrain.data.text_similarity import RougeIndex


def texts(count: int, seed: int) -> list[str]:
    """Return different runs of words of the reviews."""
    lines = packaged_or_own("packaged:movie_reviews.tsv").read_text(encoding="utf-8").splitlines()[1:]
    words = " ".join(line.split("\t")[-1] for line in lines).split()
    rng = random.Random(seed)
    out: dict[str, None] = {}
    while len(out) < count:
        start = rng.randrange(len(words) - 20)
        out[" ".join(words[start : start + rng.randrange(6, 21)])] = None
    return list(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=int, default=50_000, help="kept tasks (50,000)")
    parser.add_argument("--new", type=int, default=50, help="new tasks (50)")
    parser.add_argument("--compared", type=int, default=2_000, help="kept tasks that the peer is timed on (2,000)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise SystemExit("the peer is missing: pip install rouge-score") from error
    made = texts(args.kept + args.new, 0)
    kept, new = made[: args.kept], made[args.kept :]
    began = time.perf_counter()
    index = RougeIndex(0.7, kept)
    filled = time.perf_counter() - began
    part = RougeIndex(1e-9, kept[: args.compared])  # finds the highest score whatever it is
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    ours, peer, near = [], [], 0
    for text in new:
        began = time.perf_counter()
        near += index.nearest(text)[1] is not None
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        scores = [scorer.score(text, other)["rougeL"].fmeasure for other in kept[: args.compared]]
        peer.append((time.perf_counter() - began) * args.kept / args.compared)
        found = part.nearest(text)[0]
        if abs(found - max(scores)) > 1e-9:
            raise SystemExit(f"ours finds {found}, the peer {max(scores)}, for {text!r}")
    figures = {
        "kept": args.kept,
        "fill_seconds": round(filled, 3),
        "ours_ms": round(1e3 * median(ours), 3),
        "peer_ms": round(1e3 * median(peer), 1),
        "similar": near,
        "speed": round(median(peer) / median(ours), 1),
    }
    print(f"{args.kept:,} kept tasks, {args.new} new ones, {near} too similar; index filled in {filled:.2f} s")
    print(f"a new task: ours {figures['ours_ms']:.2f} ms, rouge-score {figures['peer_ms']:.0f} ms")
    if args.json:
        write_json(args.json, figures)
    print(f"speed={figures['speed']:g}")


if __name__ == "__main__":
    main()
