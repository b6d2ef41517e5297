"""Tell the memory that a recipe's stages take, for training and for serving, before anything is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from posttrain.config import AdapterConfig, ModelConfig, Recipe, StageConfig, TrainConfig, references
from posttrain.core.files import bytes_of_weights
from posttrain.losses.linear_logprobs import CHUNK_BYTES
from posttrain.models.loading import load_tokenizer, pick_device, pick_dtype, resolve
from posttrain.models.model_shape import ModelShape, model_shape
from posttrain.runs import registry
from posttrain.sampling.engine import PREFILL_TOKENS
from posttrain.sampling.memory import memory_bytes
from posttrain.trainer import memory_model
from posttrain.trainer.memory_model import FORMATS, WeightFormat
from posttrain.trainer.stage import Stage, StageContext
from posttrain.trainer.token_budget import CPU_TOKENS, LEAST, budget_for, bytes_of_token, cpu_tokens
from posttrain.trainer.workload import Workload

TRAINED_IN = ("float32", "bfloat16", "nf4")
"""Formats of the columns for training; nf4 is QLoRA: adapters on weights in 4 bit."""
QLORA_RANK = 16
"""Rank of the adapters that the column of nf4 has where the recipe has none."""
SURELY = 12
"""A model whose files are smaller than memory by this factor fits, whatever trains it (16 bit, with an optimizer)."""
WAYS = (
    "lower systems.tokens_per_micro_batch, train adapters (adapter: {r: 16}), or set systems.activation_checkpointing"
)
"""What to do about a stage that does not fit."""


@dataclass(frozen=True)
class TrainingMemory:
    """Hold what a stage takes in one format.

    Attributes:
        parts: Bytes by name, of what is held at the same time while a step is taken.
        phases: Bytes of the whole process or GPU by phase: opening the model, sampling, a step.
    """

    parts: dict[str, int]
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        """Return the most that it takes."""
        return max(self.phases.values())


@dataclass(frozen=True)
class StageMemory:
    """Hold the memory of one stage.

    Attributes:
        name: Name of the stage.
        tokens: Tokens of its largest micro-batch; of them `targets` go through the output head.
        trained: Parameters that are trained.
        own: As the recipe has it. None: the stage trains nothing.
        formats: By format, for comparison.
        notes: What is assumed.
    """

    name: str
    tokens: int
    targets: int
    trained: int
    own: TrainingMemory
    formats: dict[str, TrainingMemory]
    notes: list[str] = field(default_factory=list)

    @property
    def parts(self) -> dict[str, int]:
        """Return the parts as the recipe has it."""
        return self.own.parts

    @property
    def peak(self) -> int:
        """Return the peak as the recipe has it."""
        return self.own.peak


@dataclass(frozen=True)
class ServingMemory:
    """Hold what serving takes in one format.

    Attributes:
        weights: Bytes of the weights.
        cache: Of keys and values.
        work: Of computing prompts and a step's logits.
        beside: On a CPU: pages of the file that became other numbers, and what libraries take.
    """

    weights: int
    cache: int
    work: int
    beside: int

    @property
    def total(self) -> int:
        """Return the sum."""
        return self.weights + self.cache + self.work + self.beside


@dataclass(frozen=True)
class MemoryPlan:
    """Hold the memory of a recipe.

    Attributes:
        shape: Sizes of its model.
        device: cpu, or cuda.
        room: Bytes that there are.
        training: A record for each stage.
        serving: By format, of the model that the recipe starts from.
        served: (sequences, tokens of each) of serving.
        kv_cache: "int8" if keys and values are served so.
    """

    shape: ModelShape
    device: str
    room: float
    training: list[StageMemory]
    serving: dict[str, ServingMemory]
    served: tuple[int, int]
    kv_cache: str | None = None

    @property
    def too_large(self) -> list[StageMemory]:
        """Return the stages that take more than there is."""
        return [line for line in self.training if line.peak > self.room]


@dataclass(frozen=True)
class _Setting:
    """Hold what a stage is computed with: weights, compute dtype, trained parameters, and where.

    added: of the trained parameters, those of adapters. stored: bytes of the model's files (None: unknown).
    optimizer: its kind.
    """

    shape: ModelShape
    weights: WeightFormat
    itemsize: int
    trained: int
    added: int
    rank: int
    adapted: tuple[str, ...]
    device: str
    room: float
    stored: int | None
    optimizer: str


def plan_memory(
    recipe: Recipe,
    gpu_gib: float | None = None,
    prepared: Mapping[str, Stage] | None = None,
    sequences: int = 1,
    tokens: int = 2048,
    kv_cache: str | None = None,
) -> MemoryPlan:
    """Estimate the memory of every stage of a recipe, and of serving its model.

    Args:
        recipe: The recipe.
        gpu_gib: Memory of a GPU to plan for, in GiB. None: the device that the recipe would use here.
        prepared: Stages whose data is read already, by name of their folder. None: it is read here.
        sequences: Sequences that are served at the same time.
        tokens: Positions of each of them; at most the model's context.
        kv_cache: "int8" if keys and values are served so. None: in the compute dtype of each format.

    Raises:
        PosttrainError: The model's configuration or the data can't be read.
    """
    shape = model_shape(recipe.model)
    device = "cuda" if gpu_gib is not None else pick_device(recipe.model.device).type
    room = gpu_gib * 2**30 if gpu_gib is not None else room_of(device)
    prepared = read_stages(recipe, shape.context) if prepared is None else prepared
    training = [
        _stage_memory(recipe, stage, prepared.get(name), shape, device, room)
        for name, stage in recipe.in_order()[: len(recipe.stages)]
    ]
    tokens = min(tokens, shape.context or tokens)
    stored, served = _stored_bytes(recipe.model.source), (sequences, tokens)
    serving = {
        name: _serving_memory(
            shape, memory_model.served_as(weights, device), device, stored, served, kv_cache == "int8"
        )
        for name, weights in FORMATS.items()
        if name != "float16"
    }
    return MemoryPlan(shape, device, room, training, serving, served, kv_cache)


def _serving_memory(
    shape: ModelShape, weights: WeightFormat, device: str, stored: int | None, served: tuple[int, int], int8: bool
) -> ServingMemory:
    """Add up the parts of serving in one format.

    stored: bytes of the model's files (None: unknown). int8: keys and values are.
    """
    (sequences, tokens), item = served, _item(weights, device)
    beside = 0
    if device == "cpu":
        beside = memory_model.unused_pages(shape, weights, stored) + memory_model.SERVING_LIBRARIES
    return ServingMemory(
        memory_model.weight_bytes(shape, weights),
        memory_model.cache_bytes(shape, sequences * tokens, item, int8),
        _prefill(shape, min(tokens, PREFILL_TOKENS[device_kind(device)]), sequences, item),
        beside,
    )


def device_kind(device: str) -> str:
    """Return the kind of a device that limits are known for."""
    return device if device in PREFILL_TOKENS else "cpu"


def room_of(device: str) -> float:
    """Return the bytes of memory that there are for a process on a device."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[1])
    return memory_bytes()


def read_stages(recipe: Recipe, context_tokens: int | None) -> dict[str, Stage]:
    """Read the data of every stage that does not wait for rows of an earlier one; return them by name of their folder.

    Args:
        recipe: The recipe.
        context_tokens: The model's context. None: it names none.
    """
    context = StageContext(load_tokenizer(recipe.model), context_tokens or 2048, None, recipe.evaluate)
    makes = {stage.name: stage.makes for stage in recipe.stages}
    out = {}
    for name, stage in recipe.in_order()[: len(recipe.stages)]:
        if any(makes[needed] == "data" for needed in references(stage)):
            continue
        if references(stage):  # models of earlier stages are like the recipe's own, as far as data goes
            stage = _with_models(stage, recipe.model.source)
        out[name] = registry.prepare_stage(stage, context)
    return out


def _with_models(stage: StageConfig, source: str) -> StageConfig:
    def walk(value: Any) -> Any:
        if isinstance(value, str) and value.startswith("stage:"):
            return source
        if isinstance(value, dict):
            return {k: walk(v) for k, v in value.items()}
        return [walk(v) for v in value] if isinstance(value, list) else value

    return type(stage).model_validate(walk(stage.model_dump(mode="json")))


def _stage_memory(
    recipe: Recipe, config: StageConfig, stage: Stage | None, shape: ModelShape, device: str, room: float
) -> StageMemory:
    """Estimate the memory of a stage, in the recipe's format and in those of `TRAINED_IN`."""
    waiting = "rows that an earlier stage makes are not known yet"
    work = stage.workload() if stage is not None else Workload(note=waiting)
    notes = [work.note] if work.note else []
    if config.start not in (None, "base") and not str(config.start).startswith("stage:"):
        shape = model_shape(recipe.model.model_copy(update={"source": config.start, "revision": None}))
    trains = isinstance(config, TrainConfig)
    adapter = getattr(config, "adapter", None)
    stored = _stored_bytes(recipe.model.source) if config.start in (None, "base") else None
    quantized = recipe.model.quantization
    there = device != "cuda" or torch.cuda.is_available()
    auto = "bfloat16" if recipe.model.dtype == "auto" and not there else recipe.model.dtype  # of a GPU elsewhere
    dtype = str(pick_dtype(auto, torch.device(device))).removeprefix("torch.")
    base = FORMATS[dtype]

    def setting(weights: WeightFormat, itemsize: int, rank: int) -> _Setting:
        chosen = adapter if adapter is not None else AdapterConfig(r=rank) if rank else None
        added, names = 0, tuple[str, ...]()
        if trains and chosen is not None:
            added = shape.adapter_parameters(chosen)
            names = () if chosen.is_soft_prompt else tuple(shape.adapted(chosen))
            rank = 0 if chosen.is_soft_prompt else chosen.r
        trained = added or (shape.parameters if trains else 0)
        kind = getattr(getattr(config, "optimizer", None), "kind", "adamw")
        rank = rank if added else 0
        return _Setting(shape, weights, itemsize, trained, added, rank, names, device, room, stored, kind)

    own_format = base
    if quantized is not None:
        fine = 1 + 4 / 256 if quantized.double else 4
        own_format = WeightFormat(quantized.kind, base.bytes, 4, 64, fine, experts=base.bytes)
    own_setting = setting(own_format, int(base.bytes), 0)
    together = recipe.systems.sequence_parallel
    budget = _budget(config, own_setting, stage) * together
    tokens, targets = work.micro_batch(budget, shape.context) if trains else (0, 0)
    if together > 1 and tokens:  # loss tokens may all lie in one process's slice
        tokens = -(-tokens // together)
        targets = min(targets, tokens)
        notes.append(
            f"of one of {together} processes that compute a micro-batch together: activations are divided by as many; "
            "weights, gradients and optimizer, which FSDP2 divides too, are counted in full"
        )
    systems = getattr(config, "systems", None)
    lean = bool(systems is not None and systems.activation_checkpointing)

    def memory(s: _Setting) -> TrainingMemory:
        found = _training_memory(s, work, tokens, targets, lean)
        if s.added and s.weights.bits is not None and getattr(config, "merge", False):  # beside full weights
            held = sum(v for name, v in found.parts.items() if name not in ("activations", "logits", "keys and values"))
            found.phases["merging"] = held + round(shape.parameters * s.weights.bytes)
        return found

    formats = {}
    for name in TRAINED_IN if trains else ():
        weights = FORMATS[name]
        item = int(weights.bytes)
        formats[name] = memory(setting(weights, item, QLORA_RANK if name == "nf4" else 0))
    if trains and adapter is None:
        notes.append(f"nf4: with adapters of rank {QLORA_RANK}, since weights in 4 bit can't be trained")
    if getattr(config, "train", None) is not None:
        notes.append("every weight is counted as trained, and train selects some of them")
    if trains and not work.units:
        notes.append(f"a micro-batch of {tokens:,} tokens is assumed")
    return StageMemory(config.name, tokens, targets, own_setting.trained, memory(own_setting), formats, notes)


def _training_memory(s: _Setting, work: Workload, tokens: int, targets: int, lean: bool) -> TrainingMemory:
    """Add up the parts of a stage in one setting."""
    shape, on_gpu = s.shape, s.device == "cuda"
    weights = memory_model.weight_bytes(shape, s.weights)
    adapters = {"adapters": memory_model.FLOAT * s.added} if s.added else {}  # float32 also on weights in 16 bit
    itemsize = memory_model.FLOAT if s.added else s.itemsize
    matrices = s.trained if s.added else min(s.trained, shape.linear - shape.experts)
    width = max(1, s.rank) if s.added else shape.hidden
    state = memory_model.state_bytes(s.trained, itemsize, s.optimizer, matrices, width)
    parts = {"weights": weights, **adapters, **state}
    if work.frozen:
        parts["reference"] = weights
    if work.copied:
        parts["copies to sample with"] = 2 * s.trained * itemsize
    teacher = 0
    if work.teacher:
        like = model_shape(work.teacher) if isinstance(work.teacher, ModelConfig) else shape
        teacher = memory_model.weight_bytes(like, s.weights)
        if work.teacher_stays:
            parts["teacher"] = teacher
        elif work.teacher_head:
            parts["teacher"] = round(like.vocabulary * like.hidden * s.weights.bytes)
    held = sum(parts.values())
    if tokens:
        if on_gpu:
            each = bytes_of_token(shape, s.itemsize, lean)
            parts["activations"] = tokens * each
            parts["logits"] = 3 * CHUNK_BYTES["cuda"] + 4 * shape.vocabulary * shape.hidden * bool(not s.rank)
        else:
            parts["activations"] = memory_model.activation_bytes(shape, tokens, s.itemsize, s.rank, s.adapted, lean)
            if work.divergence:
                parts["logits"] = memory_model.divergence_bytes(shape, not s.rank)
            else:
                parts["logits"] = memory_model.logits_bytes(shape, targets, not s.rank, work.sums)
    parts["libraries"] = memory_model.library_bytes(shape, s.device)
    pages = 0 if on_gpu else memory_model.unused_pages(shape, s.weights, s.stored)
    phases = {"step": sum(parts.values()), "opening": weights + pages + parts["libraries"]}
    if teacher and tokens:
        at_once = _prefill(shape, tokens, 0, s.itemsize) + memory_model.logits_bytes(shape, targets, False, True)
        phases["asking the teacher"] = weights + teacher + at_once + parts["libraries"]
    if work.completions is not None:
        c = work.completions
        cache = memory_model.cache_bytes(shape, c.positions, s.itemsize, c.int8)
        parts["keys and values"] = cache
        at_once = min(PREFILL_TOKENS[device_kind(s.device)], c.prompts * c.prompt_tokens)
        rows = min(c.running, c.prompts * c.each)
        phases["sampling"] = held + cache + _prefill(shape, at_once, rows, s.itemsize) + parts["libraries"]
        if not on_gpu:  # malloc keeps the pages of keys and values for the next step's
            phases["step"] += cache
    return TrainingMemory(parts, phases)


def _prefill(shape: ModelShape, tokens: int, sequences: int, itemsize: int) -> int:
    """Return the bytes of computing prompts without gradients, and the logits of one step."""
    layer = (4 * shape.hidden + 2 * shape.query + 2 * shape.key_value + 3 * shape.inner) * itemsize
    return tokens * layer + 3 * 4 * sequences * shape.vocabulary


def _budget(config: StageConfig, s: _Setting, stage: Stage | None) -> int:
    systems = getattr(config, "systems", None)
    if systems is None:
        return CPU_TOKENS
    if systems.tokens_per_micro_batch:
        return int(systems.tokens_per_micro_batch)
    if s.device == "cuda":
        per_token = bytes_of_token(s.shape, s.itemsize, systems.activation_checkpointing)
        free = s.room - memory_model.weight_bytes(s.shape, s.weights)
        return budget_for(per_token, s.shape.vocabulary, s.shape.hidden, int(free), int(s.room), s.trained)
    adapter = getattr(config, "adapter", None)
    return cpu_tokens(adapter.computed_tokens()[0] if adapter is not None else 0) if s.device == "cpu" else LEAST


def _item(weights: WeightFormat, device: str) -> int:
    """Return the bytes of a number of activations and keys: a CPU computes weights in few bits in float32."""
    return 4 if weights.bits is not None and device == "cpu" else int(weights.bytes)


def memory_warning(recipe: Recipe, prepared: Mapping[str, Stage]) -> list[str]:
    """Return lines on stages that take more memory than there is; none for models that are small for the machine.

    Args:
        recipe: The recipe.
        prepared: Stages whose data is read already, by name of their folder.
    """
    stored = _stored_bytes(recipe.model.source)
    if stored is None:
        return []
    device = pick_device(recipe.model.device).type
    room = room_of(device)
    if stored * SURELY < room:
        return []
    try:
        plan = plan_memory(recipe, prepared=prepared)
    except Exception as error:  # an estimate must not end a run that may fit
        return [f"the memory of the stages could not be estimated ({type(error).__name__}: {error})"]
    return [
        f"{line.name} is estimated to take {line.peak / 1e9:.1f} GB, and there are {room / 1e9:.1f}: {WAYS} "
        "(posttrain memory has the details)"
        for line in plan.too_large
    ]


def _stored_bytes(source: str) -> int | None:
    """Return the bytes of a whole model's files; None if they are not on this machine."""
    found = resolve(source)
    folder = Path(found.location)
    if found.kind != "folder" or not (folder / "config.json").is_file():  # a Hub name, a tiny model, an adapter
        return None
    return sum(p.stat().st_size for p in folder.glob("*.safetensors")) or bytes_of_weights(folder)
