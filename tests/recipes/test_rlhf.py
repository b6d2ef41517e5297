"""RLHF and RLAIF from end to end: rounds, and what the page shows, on a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import posttrain
from posttrain.core.files import read_lines
from posttrain.recipe.parsing import dump_recipe
from posttrain.sampling.rollout_store import read_rollouts, rollouts_path

PAGE = Path(__file__).parents[2] / "docs" / "rlhf.md"


def block(name: str) -> dict[str, Any]:
    """The page's own YAML of that name."""
    found = re.search(rf"```yaml\n# {name}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    return yaml.safe_load(found[1])  # type: ignore[no-any-return]


def small(value: Any, tmp_path: Path) -> Any:
    """Every judge a tiny model with a store of its own."""
    if isinstance(value, dict):
        value = {k: small(v, tmp_path) for k, v in value.items()}
        if value.get("mode") == "score":
            value |= {"model": {"source": "tiny:gpt2"}, "store": str(tmp_path / "judge.sqlite3")}
    return [small(v, tmp_path) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's rounds, small: every setting that says how much, and nothing else."""
    tmp_path = tmp_path_factory.mktemp("rounds")
    given = small(block("rounds.yaml"), tmp_path) | {"model": {"source": "tiny:llama"}}
    labels, proxy, policy = given["stages"]
    labels["answers"]["problems"]["data"]["rows"] = policy["problems"]["data"]["rows"] = [6000, 6008]
    labels["answers"]["sampler"]["max_tokens"] = policy["sampler"]["max_tokens"] = 5
    proxy |= {"max_steps": 3, "batch_size": 4}
    policy |= {"steps": 2, "prompts_per_step": 2, "group_size": 3, "optimizer": {"lr": 0.05}}
    given["evaluate"][0]["problems"]["data"]["rows"] = [9100, 9106]
    return posttrain.run(posttrain.Recipe.model_validate(given), tmp_path / "run").folder


def test_each_round_starts_from_the_last_policy_and_samples_and_labels_anew(rounds: Path) -> None:
    records = {r["name"]: r for r in json.loads((rounds / "manifest.json").read_text())["stages"]}
    assert list(records) == ["labels", "proxy", "policy", "labels.2", "proxy.2", "policy.2"]
    assert records["policy"]["from"] == "tiny:llama" and records["labels.2"]["from"] == records["policy"]["to"]
    assert records["proxy.2"]["from"] == "tiny:llama"  # start: base
    assert records["policy.2"]["from"] == records["policy"]["to"] and records["policy.2"]["to"].endswith(
        "policy.2/model"
    )
    first, second = (read_lines(rounds / "stages" / f / "data" / "rows.jsonl") for f in ("0-labels", "3-labels.2"))
    assert {r["prompt"] for r in first} & {r["prompt"] for r in second}  # the same beginnings,
    assert not {r["chosen"] for r in first} & {r["chosen"] for r in second}  # and other answers to them
    for rows, folder in ((first, "0-labels"), (second, "3-labels.2")):
        sampled = read_rollouts(rollouts_path(rounds / "stages" / folder / "rollouts", 1))
        texts = {r["completion"].rstrip() for r in sampled}
        assert {r["chosen"] for r in rows} <= texts and {r["rejected"] for r in rows} <= texts
        assert all(r["labels"] == "judge" and r["prompt"].startswith("Movie review: ") for r in rows)


def test_the_answers_of_a_round_are_those_of_the_policy_that_it_starts_from(rounds: Path) -> None:
    """What was sampled in round 2 is likely under the model that round 1 left: its log-probabilities are the file's."""
    import torch
    from transformers import AutoModelForCausalLM

    row = read_rollouts(rollouts_path(rounds / "stages" / "3-labels.2" / "rollouts", 1))[0]
    ids = torch.tensor([[*row["prompt_tokens"], *row["tokens"]]])
    start = len(row["prompt_tokens"])
    found = {}
    for name in ("2-policy", "5-policy.2"):
        model = AutoModelForCausalLM.from_pretrained(rounds / "stages" / name / "model", dtype=torch.float32)
        with torch.no_grad():
            logprobs = (model(ids).logits[0] / 0.8).log_softmax(-1)
        found[name] = [float(logprobs[start - 1 + t, token]) for t, token in enumerate(row["tokens"])]
    assert found["2-policy"] == pytest.approx(row["logprobs"], abs=1e-4)
    assert found["5-policy.2"] != pytest.approx(row["logprobs"], abs=1e-4)


def test_the_reward_of_a_round_is_its_own_reward_model_s(rounds: Path) -> None:
    from posttrain.rewards.reward_model_scorer import RewardModel

    row = read_rollouts(rollouts_path(rounds / "stages" / "5-policy.2" / "rollouts", 1))[0]
    prompt = [{"role": "user", "content": row["prompt"]}]
    scores = {
        name: RewardModel(str(rounds / "stages" / name / "reward_model"), normalise=True)(
            [prompt], [row["completion"]]
        )[0]
        for name in ("1-proxy", "4-proxy.2")
    }
    assert row["reward"] == pytest.approx(scores["4-proxy.2"], abs=1e-4)
    assert scores["1-proxy"] != pytest.approx(scores["4-proxy.2"], abs=1e-4)


def test_the_page_s_direct_variant_runs(tmp_path: Path) -> None:
    """rlaif_sentiment with the page's rewards in place of the proxy's: no labels, no reward model."""
    given = yaml.safe_load(dump_recipe(posttrain.load_recipe("rlaif_sentiment", ["model.source=tiny:llama"])))
    (policy,) = (s for s in given["stages"] if s["name"] == "policy")
    policy |= small(block("direct.yaml"), tmp_path) | {"steps": 1, "prompts_per_step": 2, "group_size": 2}
    policy |= {"start": None, "held_out": None, "sampler": {"max_tokens": 5}}
    policy["problems"]["data"]["rows"] = [6000, 6010]
    recipe = posttrain.Recipe.model_validate({**given, "stages": [policy], "evaluate": []})
    result = posttrain.run(recipe, tmp_path / "run")
    (record,) = read_lines(result.folder / "stages" / "0-policy" / "metrics.jsonl")
    assert 0 <= record["reward/judge"] <= 1 and record["reward"] == record["reward/judge"]


@pytest.mark.parametrize("method", [pytest.param("ppo", marks=pytest.mark.long), "grpo", "online_dpo"])
def test_a_reward_model_teaches_by_other_methods_too(method: str, tmp_path: Path) -> None:
    """What the policy is given is what the reward model that was trained before says of its answers; online DPO's
    second part is a judge."""
    rows = [{"prompt": f"p{i % 9}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    judge = {"model": {"source": "tiny:gpt2"}, "mode": "score", "scale": {"bad": 0, "good": 1},
             "store": str(tmp_path / "judge.sqlite3")}  # fmt: skip
    parts: list[Any] = [{"kind": "reward_model", "name": "proxy", "source": "stage:proxy"}]
    parts += [{"kind": "judge", "judge": judge}] if method == "online_dpo" else []
    policy = {
        "method": method,
        "name": "policy",
        "start": "base",
        "problems": {"kind": "rows", "answers": False,
                     "data": {"source": str(tmp_path / "pairs.jsonl"), "completion": "-", "prompt": "{prompt}"}},
        "rewards": {"terms": parts},
        "sampler": {"max_tokens": 5},
        "prompts_per_step": 3,
        "group_size": 3,
        "steps": 2,
        **({} if method == "online_dpo" else {"kl": {"coefficient": 0.1, "where": "reward", "estimator": "k1"}}),
    }  # fmt: skip
    proxy = {"method": "reward_model", "name": "proxy", "data": {"source": str(tmp_path / "pairs.jsonl")}}
    proxy |= {"max_steps": 2, "batch_size": 4}
    recipe = posttrain.Recipe.model_validate(
        {"name": "r", "model": {"source": "tiny:llama"}, "stages": [proxy, policy]}
    )
    folder = posttrain.run(recipe, tmp_path / "run").folder / "stages"
    from posttrain.rewards.reward_model_scorer import RewardModel

    scorer = RewardModel(str(folder / "0-proxy" / "reward_model"))
    kept = read_rollouts(rollouts_path(folder / "1-policy" / "rollouts", 1))
    asked = [rows[int(r["source"].split(":")[-1]) - 1]["prompt"] for r in kept]
    scores = scorer([[{"role": "user", "content": a}] for a in asked], [r["completion"] for r in kept])
    assert [r["parts"]["proxy"] for r in kept] == pytest.approx(scores, abs=1e-4)
    if method == "online_dpo":
        assert all(0 <= r["parts"]["judge"] <= 1 for r in kept) and len({r["parts"]["judge"] for r in kept}) > 1


@pytest.mark.parametrize("size", ["sentiment", "lab"])
def test_the_two_recipes_differ_in_who_labels_and_nothing_else(size: str) -> None:
    one, two = (yaml.safe_load(dump_recipe(posttrain.load_recipe(f"{n}_{size}"))) for n in ("rlhf", "rlaif"))
    labels = [next(s for s in r["stages"] if s["name"] == "labels") for r in (one, two)]
    assert (labels[0].pop("labels"), labels[1].pop("labels")) == ("human", "judge")
    assert labels[0].pop("judge", None) is None and labels[1].pop("judge")["mode"] == "score"
    for r in (one, two):
        del r["name"], r["description"]
    assert one == two
