"""Tweets and product reviews, each rated by about twenty people from -4 (negative) to 4 (positive).

The movie reviews of the same publication ship with posttrain (packaged:movie_reviews.tsv).
"""

from __future__ import annotations

import html
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from downloads import Downloads
from tables import Table

PACKAGE, VERSION = "vaderSentiment", "3.3.2"
ABOUT = f"PyPI's source distribution of {PACKAGE} {VERSION} (Hutto and Gilbert, ICWSM 2014)"
LICENCE = "MIT"
FILES = {"tweets": "tweets", "product_reviews": "amazonReviewSnippets"}
LARGEST_DIFFERENCE = 0.05
"""Between the published mean and the mean of the published ratings of a text: a larger one is an error of the data."""


def make_tables(downloads: Downloads) -> Iterator[Table]:
    """Yield the tables tweets and product_reviews."""
    folder = downloads.source_distribution(PACKAGE, VERSION)
    archive = next(folder.rglob("hutto_ICWSM_2014.tar.gz"))
    with tarfile.open(archive) as tar:
        for name, prefix in FILES.items():
            texts, ratings = (
                tar.extractfile(f"hutto_ICWSM_2014/{prefix}_{kind}.txt").read().decode("utf-8-sig")  # type: ignore[union-attr]
                for kind in ("GroundTruth", "anonDataRatings")
            )
            yield review_table(name, texts, ratings)
    yield movie_table()


def review_table(name: str, texts: str, ratings: str) -> Table:
    """Join texts and ratings.

    Args:
        name: Name of the table.
        texts: Lines of id, mean rating and text.
        ratings: Lines of id, mean, standard deviation and the list of ratings.

    Returns:
        Columns id, mean_rating, std, ratings, text. The mean is that of the ratings.
    """
    table = Table(name, unique=("text",), tsv=True)
    rated = {line.split("\t")[0]: line.split("\t") for line in ratings.splitlines() if line.strip()}
    for line in filter(str.strip, texts.splitlines()):
        identity, published, text = line.split("\t", 2)
        text = " ".join(html.unescape(html.unescape(text)).split())
        if not re.search(r"[^\W\d_]{2}", text):
            table.drop("no words", text)
            continue
        if identity not in rated:
            table.drop("no ratings", line)
            continue
        given = [int(n) for n in rated[identity][3].strip().strip('"[]').split(",")]
        mean = sum(given) / len(given)
        if abs(mean - float(published)) > LARGEST_DIFFERENCE:
            table.drop("the published mean is not that of the ratings", f"{published} and {mean:.3f}: {text}")
            continue
        spread = (sum((n - mean) ** 2 for n in given) / len(given)) ** 0.5
        table.add(
            id=identity, mean_rating=f"{mean:.4f}", std=f"{spread:.4f}", ratings=",".join(map(str, given)), text=text
        )
    return table


def movie_table() -> Table:
    """Return the movie reviews that ship with posttrain, for the folder to hold all tables."""
    from posttrain.data.readers import packaged_or_own

    table = Table("movie_reviews", unique=("text",), tsv=True)
    path: Path = packaged_or_own("packaged:movie_reviews.tsv")
    head, *lines = path.read_text(encoding="utf-8").splitlines()
    for line in lines:
        table.add(**dict(zip(head.split("\t"), line.split("\t"), strict=True)))
    return table
