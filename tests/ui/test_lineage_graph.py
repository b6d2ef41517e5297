"""What a run comes from is left of it, what begins with it is right of it."""

from __future__ import annotations

import json
from pathlib import Path

from posttrain.ui.lineage_graph import HEIGHT, LineageGraph, lineage_graph
from posttrain.ui.run_index import RunIndex


def make_run(folder: Path, source: str, stages: list[dict], data: list[dict]) -> Path:
    for i, stage in enumerate(stages):
        (folder / "stages" / f"{i}-{stage['name']}" / "model").mkdir(parents=True)
    (folder / "model").mkdir()
    (folder / "recipe.yaml").write_text("name: x")
    noted = [{"method": "sft", "makes": "model", "status": "done", **stage} for stage in stages]
    manifest = {"status": "done", "model": {"source": source}, "stages": noted, "data": data}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def edges(graph: LineageGraph) -> set[tuple[str, str]]:
    return {(graph.nodes[a].name, graph.nodes[b].name) for a, b in graph.edges}


def test_graph(tmp_path: Path) -> None:
    base = make_run(
        tmp_path / "base", "tiny:llama",
        [{"name": "sft", "from": "tiny:llama"}, {"name": "asked", "from": f"{tmp_path}/base/stages/0-sft/model"}],
        [{"stage": "sft", "source": ["chats.jsonl", "more.jsonl"]}],
    )  # fmt: skip
    rows = f"{base}/stages/1-asked/data/rows.jsonl"
    own = make_run(
        tmp_path / "own", str(base), [{"name": "dpo", "from": str(base)}], [{"stage": "dpo", "source": rows}]
    )
    merged = {"models": [{"source": str(base)}, {"source": str(own)}]}
    make_run(tmp_path / "later", f"{own}/model", [{"name": "merge", "from": f"{own}/model", "merged": merged}], [])
    make_run(tmp_path / "other", "tiny:llama", [{"name": "apart", "from": "tiny:llama"}], [])
    graph = lineage_graph(own, RunIndex([tmp_path]).entries())
    assert edges(graph) == {
        ("tiny:llama", "sft"), ("chats.jsonl", "sft"), ("more.jsonl", "sft"), ("sft", "asked"), ("asked", "dpo"),
        ("dpo", "merge"), ("asked", "merge"),
    }  # fmt: skip
    by_name = {n.name: n for n in graph.nodes.values()}
    assert all(graph.nodes[a].x < graph.nodes[b].x for a, b in graph.edges)
    assert by_name["dpo"].kind == "own" and by_name["sft"].kind == "stage" and by_name["chats.jsonl"].kind == "data"
    places = [(n.x, n.y) for n in graph.nodes.values()]
    assert len(set(places)) == len(places) and max(y for _, y in places) + HEIGHT < graph.height


def test_runs_that_name_each_other_in_a_circle_end(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        make_run(tmp_path / name, str(tmp_path / other), [{"name": name, "from": f"{tmp_path / other}/model"}], [])
    graph = lineage_graph(tmp_path / "a", RunIndex([tmp_path]).entries())
    assert edges(graph) == {("a", "b"), ("b", "a")}
