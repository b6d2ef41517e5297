"""Draw where a run's results come from, and what was made of them: stages, models and data as a graph."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.core.files import named_path
from posttrain.report.load import JsonDict
from posttrain.runs.lineage import stage_that_made
from posttrain.ui.run_index import RunEntry, read_manifest

WIDTH, HEIGHT, ACROSS, DOWN = 212, 58, 64, 18
"""Size of a box, and the gaps between boxes, in pixels."""
MOST_NODES = 200
LONGEST_LABEL = 23


@dataclass
class LineageNode:
    """Hold a box. kind: model, data, stage or own (a stage of the run that is looked at)."""

    name: str
    about: str
    kind: str
    run: Path | None = None
    x: int = 0
    y: int = 0

    @property
    def label(self) -> str:
        """Return the name, shortened in the middle to what fits."""
        keep = (LONGEST_LABEL - 1) // 2
        return self.name if len(self.name) <= LONGEST_LABEL else f"{self.name[:keep]}…{self.name[-keep:]}"


@dataclass
class LineageGraph:
    """Hold the boxes and the edges (from, to: keys of boxes)."""

    nodes: dict[str, LineageNode] = field(default_factory=dict)
    edges: list[tuple[str, str]] = field(default_factory=list)
    width: int = 0
    height: int = 0

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield (path in SVG, what it says) of each edge."""
        for start, end in self.edges:
            a, b = self.nodes[start], self.nodes[end]
            x1, y1, x2, y2 = a.x + WIDTH, a.y + HEIGHT // 2, b.x - 5, b.y + HEIGHT // 2
            middle = (x1 + x2) // 2
            yield f"M{x1},{y1}C{middle},{y1} {middle},{y2} {x2},{y2}", f"{a.name} to {b.name}"


def lineage_graph(run: Path, entries: Sequence[RunEntry]) -> LineageGraph:
    """Return the graph of a run: all that its stages come from, and the runs that begin with its results.

    Args:
        run: Folder of the run.
        entries: Runs among which those are looked for that begin with it.
    """
    graph = LineageGraph()
    manifests: dict[Path, JsonDict] = {}
    _add_run(graph, run, None, manifests, run)
    inside = str(run.resolve())
    for entry in entries:
        path = str(named_path(entry.model).resolve()) if "/" in entry.model else ""
        if path == inside or path.startswith(f"{inside}/"):
            _add_run(graph, entry.folder, None, manifests, run)
    _place(graph)
    return graph


def _add_run(
    graph: LineageGraph, run: Path, until: int | None, manifests: dict[Path, JsonDict], own: Path
) -> list[str]:
    """Add the stages of a run up to number `until`, and what they come from; return their keys."""
    manifest = manifests.setdefault(run.resolve(), read_manifest(run))
    records = [s for s in manifest.get("stages") or [] if isinstance(s, dict)]
    keys = [f"{run.resolve()}:{i}" for i in range(len(records))]
    for i, record in enumerate(records if until is None else records[: until + 1]):
        if keys[i] in graph.nodes or len(graph.nodes) >= MOST_NODES:
            continue
        kind = "own" if run.resolve() == own.resolve() else "stage"
        about = f"{record.get('method', '')}, {run.resolve().name}"
        graph.nodes[keys[i]] = LineageNode(str(record.get("name")), about, kind, run)
        for source, what in _sources(record, manifest):
            start = _maker(graph, source, what, run, records[:i], manifests, own)
            if start != keys[i] and (start, keys[i]) not in graph.edges:
                graph.edges.append((start, keys[i]))
    return keys


def _sources(record: Mapping[str, Any], manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what a stage has read: (source, model or data)."""
    if record.get("from"):
        yield str(record["from"]), "model"
    for model in (record.get("merged") or {}).get("models") or []:
        yield str(model.get("source")), "model"
    for data in manifest.get("data") or []:
        if data.get("stage") == record.get("name"):
            sources = data.get("source")
            yield from ((str(s), "data") for s in (sources if isinstance(sources, list) else [sources]) if s)


def _maker(
    graph: LineageGraph, source: str, what: str, run: Path, earlier: list[JsonDict], manifests: dict[Path, JsonDict],
    own: Path,
) -> str:  # fmt: skip
    """Return the key of the box of a source: the stage that made it, added if it is missing, or a box without maker."""
    found = stage_that_made(source, run, earlier) if what == "model" else _stage_of_data(source, run)
    if found is not None:
        keys = _add_run(graph, found[0], found[1], manifests, own)
        if found[1] < len(keys) and keys[found[1]] in graph.nodes:
            return keys[found[1]]
    key = f"{what}:{source}"
    name = Path(source).name if Path(source).is_absolute() else source
    graph.nodes.setdefault(key, LineageNode(name, what, what))
    return key


def _stage_of_data(source: str, run: Path) -> tuple[Path, int] | None:
    """Return the run and the number of the stage whose folder a file of rows is in."""
    found = re.search(r"^(.*?)/?stages/(\d+)-[^/]+/", source)
    if found is None:
        return None
    root = Path(found[1] or ".")
    root = root if (root / "manifest.json").is_file() else run
    return (root, int(found[2])) if (root / "stages").is_dir() else None


def _place(graph: LineageGraph) -> None:
    """Put each box right of all that it comes from, boxes of a column in the order in which they were found."""
    column = dict.fromkeys(graph.nodes, 0)
    for _ in graph.nodes:  # a longest path has no more edges than boxes; circles end here too
        changed = False
        for start, end in graph.edges:
            if column[end] <= column[start] < len(graph.nodes):
                column[end], changed = column[start] + 1, True
        if not changed:
            break
    for key, node in graph.nodes.items():  # what has no maker stands right before what reads it
        readers = [column[end] for start, end in graph.edges if start == key]
        if node.kind in ("model", "data") and readers:
            column[key] = min(readers) - 1
    used: dict[int, int] = {}
    for key, node in graph.nodes.items():
        row = used.get(column[key], 0)
        used[column[key]] = row + 1
        node.x, node.y = column[key] * (WIDTH + ACROSS) + 1, row * (HEIGHT + DOWN) + 1
    graph.width = max((n.x for n in graph.nodes.values()), default=0) + WIDTH + 1
    graph.height = max((n.y for n in graph.nodes.values()), default=0) + HEIGHT + 1
