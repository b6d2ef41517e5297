"""Self-Instruct: a model writes new tasks after a few of a person's, and their inputs and outputs.

Source: arXiv 2212.10560. Tasks are written after 8 others (6 seeds, 2 of its own), kept where ROUGE-L to all kept is below
0.7, judged to be a classification or not, and given examples: output first for a classification, input first otherwise.
Options from others: tasks made harder (Evol-Instruct, arXiv 2304.12244), outputs voted for (self-consistency, arXiv
2203.11171), rewards as a filter. Everything written is stored, and counted: kept, or dropped for one reason. The paper's
tasks begin with an ASCII letter; ours may be in any language. See docs/self-instruct.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from posttrain.config.judge import ServerConfig
from posttrain.config.rewards import RewardsConfig
from posttrain.config.settings import NAME, ModelConfig, SamplerConfig, SamplingConfig
from posttrain.core.errors import DataError
from posttrain.core.types import Message, Rollout
from posttrain.methods.data.data_stage import DataStage, DataStageConfig, refuse_torchrun, save_rows
from posttrain.methods.data.instance_loop import InstanceLoop
from posttrain.methods.data.instruction_filter import BLOCKED, diversity
from posttrain.methods.data.instruction_prompts import Ask
from posttrain.methods.data.revision_chain import NO_ROOM
from posttrain.methods.data.seed_tasks import read_seed_tasks
from posttrain.methods.data.task_loop import TaskLoop
from posttrain.sampling.frozen_sampler import open_sampler

if TYPE_CHECKING:
    from posttrain.sampling.protocol import Sampler

AskModel = Callable[[Sequence[Ask], Sequence[int], SamplingConfig], list[Rollout]]
"""(requests, a seed of each, how they are sampled) -> an answer to each; its text begins with `Ask.begin`."""


class SelfInstructConfig(DataStageConfig):
    """Self-Instruct: a model writes tasks and their answers, which become rows to train on."""

    one_process = ("method",)
    method: Literal["self_instruct"] = "self_instruct"
    name: str = Field("self_instruct", pattern=NAME, description="Name of the stage's folder in the run.")
    seeds: str = Field(
        "packaged:self_instruct_seeds.jsonl",
        description="JSON Lines file of seed tasks (instruction, classification, instances: input and output). packaged:NAME: ships with posttrain.",
    )
    instructions: int = Field(100, ge=1, description="New tasks to keep.")
    rounds: int = Field(200, ge=1, description="Most rounds of requests for new tasks.")
    requests_per_round: int = Field(8, ge=1, description="Requests that are answered side by side.")
    tasks_per_request: int = Field(8, ge=1, description="New tasks that one request asks for.")
    seeds_shown: int = Field(6, ge=1, description="Seed tasks in a request.")
    written_shown: int = Field(2, ge=0, description="Tasks of the model's own in a request, once there are some.")
    model: ModelConfig | None = Field(None, description="A model that writes instead of the policy: a teacher.")
    server: ServerConfig | None = Field(None, description="A model behind a server that writes instead.")
    chat: bool | None = Field(
        None,
        description="Ask in the chat template (true), or let the model continue plain text (false). None: chat if the model has a template.",
    )
    sampler: SamplerConfig = Field(
        SamplerConfig(temperature=0.7, top_p=0.95, max_tokens=512), description="How tasks are drawn."
    )
    answers: SamplerConfig = Field(
        SamplerConfig(temperature=0.7, top_p=0.95, max_tokens=300), description="How inputs and outputs are drawn."
    )
    similarity: float = Field(0.7, gt=0, le=1, description="ROUGE-L to any kept task from which a new one is dropped.")
    blocked: list[str] = Field(list(BLOCKED), description="Words that no task may hold: what can't be done in writing.")
    min_words: int = Field(4, ge=1, description="Fewest words of a task.")
    max_words: int = Field(150, ge=1, description="Most words of a task.")
    max_output: int = Field(4000, ge=1, description="Most characters of an output.")
    instances: int = Field(5, ge=1, description="Most examples of a task.")
    deepen: int = Field(0, ge=0, description="Rounds in which every task is rewritten to a harder one, which is added.")
    votes: int = Field(
        1,
        ge=1,
        description="Answers to each input that vote for its output; at least two, and more than for any other, must agree. 1: the output as it was written.",
    )
    rewards: RewardsConfig | None = Field(
        None, description="Rewards of each row: a judge, a reward model, rules. None: no filter by quality."
    )
    threshold: float = Field(0.0, description="Reward from which a row is kept, if there are rewards.")
    include_seeds: bool = Field(True, description="Make rows of the seed tasks too.")
    prompts_at_once: int = Field(32, ge=1, description="Tasks that are completed between two writes to the disk.")

    @model_validator(mode="after")
    def _fits(self) -> SelfInstructConfig:
        if self.model is not None and self.server is not None:
            raise ValueError(
                "either a model writes (model.source) or one behind a server (server.model): leave one out"
            )
        if self.votes == 2:
            raise ValueError("votes is 2, and two answers can't outvote each other: 1, or 3 and more")
        if self.votes > 1 and self.answers.temperature == 0:
            raise ValueError("answers.temperature is 0: all votes would be the same. Raise it, or set votes to 1")
        if self.min_words > self.max_words:
            raise ValueError(f"min_words ({self.min_words}) is more than max_words ({self.max_words})")
        if self.server is not None and self.chat is False:
            raise ValueError("a server is asked by chat: leave chat out")
        return self


class SelfInstruct(DataStage):
    """Write tasks in rounds, then their examples chunk by chunk, and save them as rows."""

    Config = SelfInstructConfig
    title = "Self-Instruct"

    def prepare(self) -> list[tuple[str, Any]]:
        """Read the seed tasks."""
        from posttrain.sampling.openai_sampler import OpenAISampler

        self.seeds = read_seed_tasks(self.config.seeds)
        if self.config.server is not None:
            OpenAISampler(self.config.server)  # a missing key or package is reported now
        return []

    def make(self, model: ModelConfig, folder: Path, seed: int) -> dict[str, Any]:
        from posttrain.rewards.stack import RewardStack

        config = self.config
        refuse_torchrun(config.method)
        with ExitStack() as stack:
            rewards = None
            if config.rewards is not None:
                rewards = stack.enter_context(RewardStack(config.rewards, self.context.functions))
            writer = LazyWriter(config, model)
            tasks, written = TaskLoop(config, self.seeds, writer, folder / "tasks", seed)()
            rows, examples = InstanceLoop(config, self.seeds, writer, folder / "instances", seed, rewards)(tasks)
        stats = {"tasks": {**written, "kept": len(tasks), **diversity(tasks)}, "rows": {**examples, "kept": len(rows)}}
        if not rows:
            why = {**written["dropped"], **examples["dropped"]}
            raise DataError(
                f"stage {config.name} made no row: {written['written']:,} tasks were written and {len(tasks):,} kept "
                f"({', '.join(f'{n:,} {reason}' for reason, n in why.items()) or 'nothing was written'}). Use a larger "
                f"model, a teacher (model or server), or raise rounds ({config.rounds})"
            )
        if config.include_seeds:
            rows = [row for task in self.seeds for row in task.rows()] + rows
        save_rows(folder, {"rows": rows}, stats)
        made = {"tasks written": written["written"], "tasks kept": len(tasks), "rows": len(rows)}
        made |= {f"task dropped: {why}": n for why, n in written["dropped"].items()}
        made |= {f"example dropped: {why}": n for why, n in examples["dropped"].items()}
        return {"made": made}


class LazyWriter:
    """Ask the model or the server; it is opened for the first request, so that a finished stage opens none."""

    def __init__(self, config: SelfInstructConfig, model: ModelConfig) -> None:
        self.config, self.model = config, model
        self.sampler: Sampler | None = None

    def __call__(self, asks: Sequence[Ask], seeds: Sequence[int], sampling: SamplingConfig) -> list[Rollout]:
        """Return an answer to each request; one without room in the context has the finish `error`."""
        from posttrain.data.chat_template import render_chat
        from posttrain.data.tokenizing import tokenize
        from posttrain.sampling.openai_sampler import OpenAISampler
        from posttrain.sampling.protocol import Request

        config = self.config
        if self.sampler is None:
            server = config.server
            self.sampler = OpenAISampler(server) if server else open_sampler(config.model or self.model, config.sampler)
        out = [Rollout((), (), "error", NO_ROOM) for _ in asks]
        tokenizer = getattr(self.sampler, "tokenizer", None)
        tokens: list[list[int]] = [[] for _ in asks]
        if tokenizer is not None:
            chat = bool(getattr(tokenizer, "chat_template", None)) if config.chat is None else config.chat
            turns: list[list[Message]] = [[{"role": "user", "content": a.text}] for a in asks]
            texts = [
                (render_chat(tokenizer, t, generation=True) if chat else a.text) + a.begin
                for t, a in zip(turns, asks, strict=True)
            ]
            tokens = tokenize(tokenizer, texts, special=not chat)
        room = getattr(self.sampler, "context", 2**31)
        fits = [i for i, t in enumerate(tokens) if len(t) + 16 < room]
        for stop in dict.fromkeys(asks[i].stop for i in fits):  # a request's stop texts are those of its kind
            group = [i for i in fits if asks[i].stop == stop]
            requests = [
                Request(tokens[i], 1, seeds[i], {"messages": [{"role": "user", "content": asks[i].text}]})
                for i in group
            ]
            params = sampling.model_copy(update={"stop": [*sampling.stop, *stop]})
            for i, done in zip(group, self.sampler.sample(requests, params), strict=True):
                rollout = done.rollouts[0]
                text = rollout.text if tokenizer is None else f"{asks[i].begin}{rollout.text}"
                out[i] = Rollout(rollout.tokens, (), rollout.finish, text)
        return out
