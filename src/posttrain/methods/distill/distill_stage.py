"""Distillation as a stage of a recipe: teachers, rows, and what is made before the first step (no torch by itself).

Sources: Hinton et al., arXiv 1503.02531; sequence level, arXiv 1606.07947; GKD (on-policy), arXiv 2306.13649.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from posttrain.config.settings import DataConfig
from posttrain.core.types import Metric, Sample
from posttrain.methods.distill.distill_settings import DistillConfig
from posttrain.trainer.stage import Stage, StageRun

if TYPE_CHECKING:
    from posttrain.methods.distill.distill_trainer import DistillationLoss, DistillTrainer
    from posttrain.methods.distill.teacher_answers import TeacherPrompt
    from posttrain.methods.distill.teacher_model import KeptNumbers, LocalTeacher, TeacherNumbers
    from posttrain.models.language_model import LanguageModel
    from posttrain.trainer.policy import LoadedPolicy
    from posttrain.trainer.workload import Workload


class Distill(Stage):
    """Teach a student: on the rows' answers, the teacher's, or its own."""

    Config = DistillConfig
    title = "Distillation"
    metrics = (
        Metric("loss", "Loss", "nats/token", "Training", "lower"),
        Metric("divergence", "Divergence from the teacher", "nats/token", "Training", "lower"),
        Metric("held_out/loss", "Held out", "nats/token", "Training", "lower", over="loss"),
        Metric("agreement", "Same likeliest token as the teacher", "share of loss tokens", "Training", "higher"),
        Metric("held_out/agreement", "Held out", "share of loss tokens", "Training", "higher", over="agreement"),
        Metric("cross_entropy", "Cross-entropy on the rows' answers", "nats/token", "Training", "lower"),
        Metric("held_out/cross_entropy", "Held out", "nats/token", "Training", "lower", over="cross_entropy"),
        Metric("token_accuracy", "Token accuracy", "share of loss tokens", "Training", "higher"),
        Metric("held_out/accuracy", "Held-out token accuracy", "share of loss tokens", "Training", "higher"),
        Metric("completions/mean_length", "Length of the student's answers", "tokens", "The student's answers"),
        Metric("completions/clipped_ratio", "Cut answers", "share of the student's", "The student's answers", "lower"),
        Metric("on_policy", "Rows that the student answers", "share", "The student's answers"),
    )
    progress = ("loss", "agreement", "held_out/loss")
    held_out: Any = None
    source_rows: Any = None
    teacher: LocalTeacher | None = None
    kept: KeptNumbers | None = None
    tops: Sequence[Any] = ()

    def prepare(self) -> list[tuple[str, Any]]:
        config: DistillConfig = self.config
        if config.divergence is not None and config.teacher.source not in (None, "start"):
            self._check_tokens()
        if config.problems is not None:
            from posttrain.data.prompts import load_prompts

            prompts = load_prompts(config.problems, self.context.tokenizer, context=self.context.context)
            self.source_rows = prompts
            self.rows = [Sample(p.tokens, [0.0] * len(p.tokens), p.source) for p in prompts.items]
            return [(config.name, prompts)]
        assert config.data is not None
        if config.teacher_text:
            from posttrain.data.mixing import refuse_weights

            refuse_weights(config.data, f"stage {config.name}: teacher_text")

        def load(data: DataConfig) -> Any:
            from posttrain.data.sft_rows import prepare

            return prepare(data, self.context.tokenizer, context=self.context.context)

        self.source_rows, self.held_out = self.read_held_out(load, config.data, config.held_out)
        self.rows = self.source_rows.samples
        return self.data

    def _check_tokens(self) -> None:
        """Compare the tokenizers, before anything is opened."""
        from posttrain.config.settings import ModelConfig
        from posttrain.methods.distill.teacher_model import check_same_tokens
        from posttrain.models.loading import load_tokenizer

        teacher = self.config.teacher.model(ModelConfig(source=""))
        check_same_tokens(self.context.tokenizer, load_tokenizer(teacher), teacher.source)

    def open(self, run: StageRun) -> LoadedPolicy:
        """Let the teacher write, and compute its numbers of fixed rows, before the student is in memory too."""
        config: DistillConfig = self.config
        opened: list[tuple[LanguageModel, Any]] = []

        def teacher() -> tuple[LanguageModel, Any]:
            from posttrain.core import distributed
            from posttrain.methods.distill.teacher_model import open_teacher
            from posttrain.models.loading import pick_device

            if not opened:
                distributed.start(pick_device(run.model.device))
                opened.append(open_teacher(config.teacher.model(run.model)))
            return opened[0]

        if config.teacher_text:
            self._let_teacher_write(run, teacher)
        self.numbers: list[int] = list(range(len(self.rows)))
        batch_at, self.steps = run.batches(self.numbers, config)
        self.batch_at: Any = batch_at
        if config.divergence is not None and config.teacher.server is None:
            self._compute_numbers(teacher)
        opened.clear()
        return super().open(run)

    def _let_teacher_write(self, run: StageRun, teacher: Any) -> None:
        from posttrain.methods.distill import teacher_answers as writing
        from posttrain.sampling.openai_client import Server

        config: DistillConfig = self.config
        server = None if config.teacher.server is None else Server(config.teacher.server)
        own_tokens = self.context.tokenizer
        spelling = None
        if server is not None:
            top_k = config.top_k if config.divergence is not None else None
            told = {"model": server.config.model, "options": server.config.options, "top_k": top_k}
            identity = {"kind": "server", "base_url": server.address, **told}
            ask = writing.server_ask(server, config.teacher_sampler, config.answers, top_k)
            prompts = self.prompts(None)
            spelling = writing.Spelling(own_tokens) if top_k else None
            same = False
        else:
            from posttrain.models.loading import load_tokenizer

            settings = config.teacher.model(run.model)
            identity, theirs = writing.model_identity(settings), load_tokenizer(settings)
            prompts = self.prompts(theirs)
            same = theirs.get_vocab() == own_tokens.get_vocab()

            def ask(some: Sequence[TeacherPrompt], seeds: Sequence[int]) -> list[list[Any]]:
                from posttrain.sampling.engine import LocalSampler

                sampler = LocalSampler(teacher()[0], theirs, **config.teacher_sampler.options())
                return writing.local_ask(sampler, config.teacher_sampler, config.answers)(some, seeds)

        answers = writing.written_answers(prompts, config.teacher_sampler, config.answers, run.seed, identity, ask)
        writing.keep_for_people(run.folder, prompts, answers)
        made = writing.student_rows(prompts, answers, own_tokens, self._end(), self.context.context, same, spelling)
        self.rows, self.tops = made.samples, made.tops
        stats = {"answers": sum(map(len, answers)), "rows": len(made.samples), "left_out": dict(made.counts)}
        self.data[0][1].stats["teacher"] = stats
        self.source_rows = None  # rows are the teacher's now

    def _in_chat(self) -> bool:
        from posttrain.data.prompts import uses_chat_template

        config: DistillConfig = self.config
        if config.data is not None:
            return config.data.chat
        return uses_chat_template(config.problems, self.context.tokenizer)

    def _end(self) -> int | None:
        """Return the token that ends an answer."""
        from posttrain.data.tokenizing import end_of_turn_token

        tokenizer = self.context.tokenizer
        found = end_of_turn_token(tokenizer) if self._in_chat() else None
        return tokenizer.eos_token_id if found is None else found

    def prompts(self, teacher: Any) -> list[TeacherPrompt]:
        """Return the prompts of all rows, as the student and a teacher with this tokenizer (None: a server) read them."""
        from posttrain.data.encoding import prompt_tokens
        from posttrain.data.prompts import load_prompts
        from posttrain.methods.distill.teacher_answers import TeacherPrompt
        from posttrain.methods.sft_measurement import before_answer

        config: DistillConfig = self.config
        if config.problems is not None:
            read = [] if teacher is None else load_prompts(config.problems, teacher, context=None).items
            found = {p.source: p.tokens for p in read}
            items = self.source_rows.items
            return [TeacherPrompt(p.tokens, found.get(p.source, ()), p.problem, p.source) for p in items]
        assert config.data is not None
        out = []
        for i, sample in enumerate(self.source_rows.samples):
            row = self.source_rows.rows[i]
            student = before_answer(sample) or prompt_tokens(row, self.context.tokenizer, config.data)
            theirs = () if teacher is None else prompt_tokens(row, teacher, config.data)
            out.append(TeacherPrompt(student, theirs, row, sample.source))
        return out

    def _compute_numbers(self, teacher: Any) -> None:
        """Compute the teacher's numbers of the rows that are drawn; where they can't be kept, keep the teacher."""
        from posttrain.methods.distill.teacher_model import KeptNumbers, LocalTeacher, check_same_tokens

        config: DistillConfig = self.config
        model, tokenizer = teacher()
        check_same_tokens(self.context.tokenizer, tokenizer, str(config.teacher.source))
        self.teacher = LocalTeacher(model, tokenizer, config.top_k, config.temperature, config.systems)
        if config.on_policy:
            return
        used = sorted({int(i) for step in range(self.steps) for i in self.batch_at(step)})
        measured = [] if self.held_out is None else list(self.held_out.samples)
        every = [*(self.rows[i] for i in used), *measured]
        kept = KeptNumbers(self.teacher, every, [*used, *(-1 - i for i in range(len(measured)))])
        if kept.megabytes > config.teacher_cache_mb:
            return
        kept.fill(f"{config.name}: the teacher's numbers")
        self.kept = kept
        self.teacher.close()

    def loss(self, device: Any) -> DistillationLoss | None:
        """Return the loss; None: cross-entropy on the teacher's text."""
        from posttrain.config.names import DIVERGENCES
        from posttrain.methods.distill.distill_trainer import DistillationLoss, kept_numbers, server_numbers

        config: DistillConfig = self.config
        if config.divergence is None:
            return None
        numbers: TeacherNumbers
        if self.kept is not None:
            numbers = kept_numbers(self.kept, device)
        elif self.teacher is not None:
            numbers = self.teacher.numbers
        else:
            assert config.top_k is not None
            numbers = server_numbers(self.tops, config.top_k, device)
        divergence = config.divergence.load(DIVERGENCES)
        return DistillationLoss(numbers, divergence, config.temperature, config.cross_entropy)

    def trainer(self, policy: LoadedPolicy, run: StageRun) -> DistillTrainer:
        from posttrain.methods.distill.distill_trainer import DistillMeasurement, DistillTrainer
        from posttrain.sampling.engine import LocalSampler
        from posttrain.trainer.train_step import Learner

        config: DistillConfig = self.config
        learner = Learner(policy.policy, config.optimizer, config.systems, self.steps)
        loss = self.loss(policy.policy.device)
        measure = None
        if self.held_out is not None:
            end = self._end()
            stops = [] if end is None else [end]
            measure = DistillMeasurement(config, policy, self.held_out, run.folder, self.context.context, stops)
            measure.loss = loss if self.teacher is not None else None
        sampler, prompts = None, []
        if config.on_policy:
            sampler = LocalSampler(policy.policy, policy.tokenizer, **config.sampler.options())
            prompts = self._student_prompts()
        self.note_teacher(policy)
        checking = self.teacher if self.kept is None else None
        return DistillTrainer(
            config, learner, self.batch_at, self.rows, loss, measure=measure, folder=run.folder, seed=run.seed,
            sampler=sampler, prompts=prompts, teacher=checking,
        )  # fmt: skip

    def note_teacher(self, policy: LoadedPolicy) -> None:
        """Write into the manifest where the teacher's numbers come from, and what it wrote."""
        notes: dict[str, Any] = {}
        if self.kept is not None:
            notes["numbers"] = f"made before the first step, {self.kept.megabytes:.1f} MiB"
        elif self.teacher is not None:
            notes["numbers"] = "made in every step"
        if self.config.teacher_text:
            notes |= self.data[0][1].stats["teacher"]
        policy.notes["teacher"] = notes

    def workload(self) -> Workload:
        """Return what a step computes, and the teacher that is asked before it, or in it (`on_policy`)."""
        config: DistillConfig = self.config
        source = str(config.teacher.source or "")
        like_student = source == "start" or source.startswith("stage:")
        teacher = True if like_student else config.teacher if source else None
        return replace(
            super().workload(),
            teacher=teacher,
            teacher_stays=config.on_policy > 0,
            teacher_head=teacher is not None and config.divergence is not None and config.top_k is None,
            divergence=config.divergence is not None,
        )

    def _student_prompts(self) -> list[Sequence[int]]:
        """Return the token ids of the prompt of each row, generation prompt included."""
        from posttrain.methods.sft_measurement import before_answer

        if self.source_rows is not None:
            return [p.student for p in self.prompts(None)]
        return [before_answer(sample) for sample in self.rows]

    def end_token(self, policy: LoadedPolicy) -> int | None:
        from posttrain.methods.sft import infer_trained_eos

        if self.config.problems is None and not self.config.teacher_text:
            return infer_trained_eos(self.rows)
        return self._end() if self._in_chat() else None
