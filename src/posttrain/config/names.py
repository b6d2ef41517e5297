"""Names in recipes: the parts of the package by name, and names of other tools with ours.

A part's name stands for the import path of its object, which is imported when a recipe names it. Wherever such a name
is accepted, ``package.module:name`` of a part from outside the package is accepted too.
"""

from __future__ import annotations

_PREFERENCE = "posttrain.methods.preference.offline:Preference"
_POLICY_GRADIENT = "posttrain.methods.rl.rl_stage:PolicyGradient"

METHODS = {
    "sft": "posttrain.methods.sft:SFT",
    "pretrain": "posttrain.methods.pretrain.pretrain_stage:Pretrain",
    "distill": "posttrain.methods.distill.distill_stage:Distill",
    **dict.fromkeys(
        ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce", "reinforce_pp", "reinforce_pp_baseline"),
        _POLICY_GRADIENT,
    ),
    **dict.fromkeys(("remax", "ppo"), _POLICY_GRADIENT),
    **dict.fromkeys(
        ("dpo", "ipo", "cdpo", "robust_dpo", "dpo_norm", "kto", "orpo", "simpo", "cpo", "preference"), _PREFERENCE
    ),
    "online_dpo": "posttrain.methods.preference.online:OnlineDPO",
    "reward_model": "posttrain.methods.reward_model.pairwise:RewardModelStage",
    "process_reward": "posttrain.methods.reward_model.process:ProcessRewardStage",
    "rejection_sampling": "posttrain.methods.data.rejection:RejectionSampling",
    "refine": "posttrain.methods.data.critique_revision:CritiqueRevision",
    "corrections": "posttrain.methods.data.corrections:Corrections",
    "feedback": "posttrain.methods.data.ai_feedback:Feedback",
    "self_instruct": "posttrain.methods.data.self_instruct:SelfInstruct",
    "instructions": "posttrain.methods.data.instructions:Instructions",
    "prune": "posttrain.methods.compress.prune:Prune",
    "quantize": "posttrain.methods.compress.quantize:Quantize",
    "merge": "posttrain.methods.merge.merge:Merge",
}
"""Methods: subclasses of `posttrain.trainer.stage.Stage`."""

DIVERGENCES: dict[str, str] = {
    name: f"posttrain.methods.distill.divergences:{name}_divergence"
    for name in ("forward_kl", "reverse_kl", "jsd", "skew", "skew_reverse")
}
"""Divergences of distillation: functions of (student's log-probabilities, teacher's)."""

MERGE_ALGORITHMS: dict[str, str] = {
    name: f"posttrain.methods.merge.algorithms:{name}_merge"
    for name in (
        *("linear", "slerp", "multi_slerp", "karcher", "model_stock", "task_arithmetic", "ties", "dare_linear"),
        *("dare_ties", "della_linear", "della", "breadcrumbs", "breadcrumbs_ties"),
    )
}
"""Algorithms that merge models: functions of a `MergeInputs`."""

PREFERENCE_LOSSES = {"hinge": "posttrain.losses.preference_loss:hinge"}
"""Losses of a pair by its answers' scores, that take the place of a preference method's loss (setting `loss`)."""

PROMPT_SOURCES: dict[str, str] = {
    "rows": "posttrain.data.prompt_sources:RowPrompts",
    "reasoning-gym": "posttrain.data.prompt_sources:GymPrompts",
    "lab": "posttrain.data.prompt_sources:LabPrompts",
    "lab_programs": "posttrain.data.prompt_sources:LabProgramPrompts",
    "human_eval": "posttrain.data.prompt_sources:HumanEvalPrompts",
}
"""Sources of prompts for RL and for data that a model makes: classes with a nested `Config` and a method `load()`."""

REWARDS: dict[str, str] = {
    "math": "posttrain.rewards.verifiers:Math",
    "exact": "posttrain.rewards.verifiers:Exact",
    "numeric": "posttrain.rewards.verifiers:Numeric",
    "choice": "posttrain.rewards.verifiers:Choice",
    "reasoning_gym": "posttrain.rewards.verifiers:ReasoningGym",
    "ifeval": "posttrain.rewards.instruction_following:InstructionFollowing",
    "self_consistency": "posttrain.rewards.verifiers:SelfConsistency",
    "format": "posttrain.rewards.text_shape:Format",
    "length": "posttrain.rewards.text_shape:Length",
    "truncation_penalty": "posttrain.rewards.text_shape:TruncationPenalty",
    "program": "posttrain.rewards.programs:Program",
    "unit_tests": "posttrain.rewards.programs:UnitTests",
    "valid_steps": "posttrain.rewards.step_rewards:ValidSteps",
    "agreement": "posttrain.rewards.step_rewards:Agreement",
    "process": "posttrain.rewards.step_rewards:ProcessScorer",
    "preference": "posttrain.rewards.model_rewards:ScorerReward",
    "reward_model": "posttrain.rewards.model_rewards:ScalarReward",
    "process_reward": "posttrain.rewards.model_rewards:StepReward",
    "judge": "posttrain.judge.judge_reward:JudgeReward",
    "improvement": "posttrain.rewards.refine_rewards:ImprovementReward",
    "corrected": "posttrain.rewards.critic_reward:CorrectedReward",
    "function": "posttrain.rewards.reward:FunctionReward",
}
"""Rewards: classes with a nested `Config`, called with (text, example); or functions of (text, example, *, settings)."""

ADAPTERS: dict[str, str] = {
    "lora": "posttrain.models.adapters:attach_low_rank",
    "dora": "posttrain.models.adapters:attach_low_rank",
    "rslora": "posttrain.models.adapters:attach_low_rank",
    "prompt": "posttrain.models.soft_prompt_adapters:attach_prompt",
    "prefix": "posttrain.models.soft_prompt_adapters:attach_prefix",
    "p_tuning": "posttrain.models.soft_prompt_adapters:attach_p_tuning",
    "p_tuning_v2": "posttrain.models.soft_prompt_adapters:attach_prefix",
}
"""Kinds of adapters: functions (model, config, seed, task) -> peft model. See `posttrain.models.adapters.attach`."""

ENVIRONMENTS: dict[str, str] = {
    "calculator": "posttrain.sampling.environments:Calculator",
    "function": "posttrain.sampling.environments:FunctionEnvironment",
    "refine": "posttrain.sampling.refine_environment:RefineEnvironment",
}
"""Environments: classes with a nested `Config`, and the methods start(example) and step(state, text)."""

FEEDBACK: dict[str, str] = {
    "calculator": "posttrain.rewards.checking_feedback:CalculatorFeedback",
    "interpreter": "posttrain.rewards.checking_feedback:InterpreterFeedback",
    "tests": "posttrain.rewards.scored_feedback:UnitTestsFeedback",
    "verifier": "posttrain.rewards.scored_feedback:VerifierFeedback",
    "reward_model": "posttrain.rewards.scored_feedback:RewardModelFeedback",
    "judge": "posttrain.judge.judge_feedback:JudgeFeedback",
    "retrieval": "posttrain.sampling.retrieval_feedback:RetrievalFeedback",
    "model": "posttrain.sampling.model_feedback:ModelFeedback",
    "function": "posttrain.sampling.feedback_source:FunctionFeedback",
}
"""Sources of feedback on an answer: classes with a nested `Config`, called with (answer, example); or functions of them.

See `posttrain.sampling.feedback_source`.
"""

SAME_ANSWER = "posttrain.rewards.verifiers:same_answer"
"""Says whether two answers have the same final answer, for environments that stop at agreement."""

EVALUATIONS: dict[str, str] = {
    "choice": "posttrain.eval.evaluation_tasks:ChoiceTask",
    "generate": "posttrain.eval.evaluation_tasks:GenerateTask",
    "perplexity": "posttrain.eval.evaluation_tasks:PerplexityTask",
    "sample": "posttrain.eval.evaluation_tasks:SampleTask",
    "refine": "posttrain.eval.refine_evaluation:RefineEvaluation",
    "score": "posttrain.eval.evaluation_tasks:ScoreTask",
    "speed": "posttrain.eval.speed_evaluation:SpeedTask",
    "ifeval": "posttrain.eval.ifeval_evaluation:IFEvalTask",
    "lm_eval": "posttrain.eval.lm_eval_evaluation:LmEvalTask",
    "counterfactual": "posttrain.eval.behaviour_evaluation:CounterfactualTask",
    "refusal": "posttrain.eval.behaviour_evaluation:RefusalTask",
    "sycophancy": "posttrain.eval.behaviour_evaluation:SycophancyTask",
    "rewording": "posttrain.eval.behaviour_evaluation:RewordingTask",
    "verbosity": "posttrain.eval.behaviour_evaluation:VerbosityTask",
}
"""Evaluations: subclasses of `posttrain.eval.evaluation_tasks.EvaluationTask`."""

ADVANTAGES: dict[str, str] = {
    "grpo": "posttrain.methods.rl.compute_advantages:grpo_advantages",
    "dr_grpo": "posttrain.methods.rl.compute_advantages:dr_grpo_advantages",
    "rloo": "posttrain.methods.rl.compute_advantages:rloo_advantages",
    "reinforce": "posttrain.methods.rl.compute_advantages:reinforce_advantages",
    "remax": "posttrain.methods.rl.compute_advantages:remax_advantages",
    "reinforce_pp": "posttrain.methods.rl.compute_advantages:reinforce_pp_advantages",
    "reinforce_pp_baseline": "posttrain.methods.rl.compute_advantages:reinforce_pp_baseline_advantages",
    "gae": "posttrain.methods.rl.compute_advantages:gae_advantages",
}
"""Advantages of RL: functions of an `AdvantageInputs`."""

POLICY_LOSSES: dict[str, str] = {
    "clipped": "posttrain.methods.rl.policy_losses:clipped_policy_loss",
    "cispo": "posttrain.methods.rl.policy_losses:cispo_policy_loss",
    "reinforce": "posttrain.methods.rl.policy_losses:reinforce_policy_loss",
}
"""Policy losses of RL: functions of a `PolicyLossInputs`."""

KL_ESTIMATORS: dict[str, str] = {
    "k1": "posttrain.methods.rl.policy_losses:kl_k1",
    "k2": "posttrain.methods.rl.policy_losses:kl_k2",
    "k3": "posttrain.methods.rl.policy_losses:kl_k3",
}
"""Estimators of the KL divergence at each sampled token: functions of (logprobs_N, reference_logprobs_N)."""

RENAMED = {
    "sampling": "sampler",
    "updates": "mini_batches",
    "passes": "ppo_epochs",
    "num_iterations": "ppo_epochs",
    "ppo_mini_batch_size": "mini_batches",
    "num_mini_batches": "mini_batches",
    "aggregation": "loss_aggregation",
    "loss_agg_mode": "loss_aggregation",
    "loss_type": "loss_aggregation",
    "importance_sampling_level": "ratio",
    "clip_low": "clip.low",
    "epsilon": "clip.low",
    "clip_ratio": "clip.low",
    "clip_ratio_low": "clip.low",
    "cliprange": "clip.low",
    "clip_high": "clip.high",
    "epsilon_high": "clip.high",
    "clip_ratio_high": "clip.high",
    "clip_dual": "clip.dual",
    "clip_ratio_c": "clip.dual",
    "entropy": "entropy_coef",
    "entropy_coeff": "entropy_coef",
    "kl_coef": "kl.coefficient",
    "init_kl_coef": "kl.coefficient",
    "kl_loss_coef": "kl.coefficient",
    "kl_loss_type": "kl.estimator",
    "kl_estimator": "kl.estimator",
    "kl_penalty": "kl.estimator",
    "target_kl": "kl.target",
    "value_lr": "critic.lr",
    "critic_lr": "critic.lr",
    "value_coefficient": "critic.coefficient",
    "vf_coef": "critic.coefficient",
    "value_trunk": "critic.detach",
    "clip_value": "critic.clip",
    "cliprange_value": "critic.clip",
    "importance_cap": "importance_sampling_cap",
    "vllm_importance_sampling_cap": "importance_sampling_cap",
    "tis_imp_ratio_cap": "importance_sampling_cap",
    "vllm_importance_sampling_mode": "importance_sampling_mode",
    "mask_truncated_completions": "mask_truncated",
    "redraws": "exploration.dynamic_sampling",
    "filter_groups": "exploration.dynamic_sampling",
    "allocate": "exploration.adaptive_group_size",
    "steer": "exploration.entropy_target",
    "target_entropy": "exploration.entropy_target",
    "carry": "exploration.partial_rollouts",
    "num_generations": "group_size",
    "rollout_n": "group_size",
    "num_prompts_per_step": "prompts_per_step",
    "max_completion_length": "sampler.max_tokens",
    "max_response_length": "sampler.max_tokens",
    "response_length": "sampler.max_tokens",
    "reward_funcs": "rewards",
    "reward_weights": "weight",
    "learning_rate": "lr",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "global_batch_size": "batch_size",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "additional_special_tokens": "add_tokens",
    "new_special_tokens": "add_tokens",
    "added_tokens": "add_tokens",
    "resize_vocab": "add_tokens",
    "model_name_or_path": "source",
    "model_name": "source",
    "pretrained_model_name_or_path": "source",
    "dataset_name": "source",
    "dataset": "data",
    "path": "source",
    "max_length": "max_tokens",
    "max_seq_length": "max_tokens",
    "cutoff_len": "max_tokens",
    "lr_scheduler_type": "schedule",
    "lr_scheduler": "schedule",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "clip_grad_norm": "max_grad_norm",
    "gradient_checkpointing": "activation_checkpointing",
    "torch_compile": "compile",
    "torch_dtype": "dtype",
    "load_in": "quantization",
    "load_in_4bit": "quantization",
    "quantization_config": "quantization",
    "bnb_4bit_quant_type": "kind",
    "bnb_4bit_use_double_quant": "double",
    "double_quant": "double",
    "bnb_4bit_compute_dtype": "compute_dtype",
    "save_steps": "checkpoint_every",
    "eval_steps": "evaluate_every",
    "eval_every": "evaluate_every",
    "eval_dataset": "held_out",
    "eval_data": "held_out",
    "val_size": "held_out",
    "val_set_size": "held_out",
    "test_size": "held_out",
    "validation_split": "held_out",
    "load_best_model_at_end": "keep_best",
    "early_stopping_patience": "early_stopping.patience",
    "early_stopping_threshold": "early_stopping.min_delta",
    "save_total_limit": "keep_checkpoints",
    "output_dir": "output",
    "lora": "adapter",
    "lora_r": "r",
    "lora_rank": "r",
    "lora_alpha": "alpha",
    "target_modules": "target",
    "use_dora": "kind",
    "use_rslora": "kind",
    "num_virtual_tokens": "tokens",
    "prompt_tuning_init": "init",
    "prompt_tuning_init_text": "text",
    "encoder_hidden_size": "hidden",
    "dataset_split": "split",
    "seed_data": "shuffle_seed",
    "data_seed": "shuffle_seed",
    "lmbda": "on_policy",
    "seq_kd": "teacher_text",
    "teacher_model": "teacher",
    "teacher_model_name_or_path": "teacher",
    "eval": "evaluate",
    "parts": "terms",
    "opened": "prompt_ends_with_tag",
}
"""Old name, or the name that TRL, verl, transformers or another tool uses -> our name.

A name on the right may be dotted (``clip.low``): its last part is a setting of the block before it.
"""

RENAMED_KINDS = {"ended": "truncation_penalty"}
"""Old value of a `kind` -> our value."""

NO_SUCH_SETTING = {
    "load_in_8bit": "model.quantization has nf4 and fp4, 4 bit; a checkpoint that is stored in 8 bit opens as it is",
    "opening": "problems of kind rows: answer_prefix_words is the number of words of the answer that begin the prompt",
    "gamma": "RL: advantages: {gamma: 0.99} is the discount of ppo and reinforce_pp; simpo: the loss's own gamma",
    "lam": "advantages: {gae_lambda: 0.95} is lambda of generalized advantage estimation (ppo)",
    "gae_lambda": "advantages: {gae_lambda: 0.95} is lambda of generalized advantage estimation (ppo)",
    "adv_estimator": "advantages names the estimator: grpo, dr_grpo, rloo, gae, ... or module:function",
    "scale_rewards": "advantages: grpo divides by the group's standard deviation, dr_grpo does not",
    "gradient_accumulation_steps": "batch_size is the number of samples of one step over all ranks; a step is split "
    "into micro-batches by systems.tokens_per_micro_batch, and the result is the same for any value",
    "packing": "batches are always packed, without padding; systems.tokens_per_micro_batch is the budget",
    "bf16": "model.dtype selects the compute dtype (bfloat16 on a GPU by default)",
    "fp16": "model.dtype selects the compute dtype (bfloat16 on a GPU by default)",
    "assistant_only_loss": "data.loss_on selects the tokens with a loss: completion, assistant or all",
    "completion_only_loss": "data.loss_on selects the tokens with a loss: completion, assistant or all",
    "train_on_inputs": "data.loss_on selects the tokens with a loss: completion, assistant or all",
    "report_to": "track has tensorboard, wandb, trackio and mlflow",
    "logging_steps": "every step is logged",
    "eval_strategy": "held_out holds rows out, and evaluate_every is the number of steps between measurements",
    "evaluation_strategy": "held_out holds rows out, and evaluate_every is the number of steps between measurements",
    "metric_for_best_model": "keep_best and early_stopping go by the held-out loss",
    "greater_is_better": "keep_best and early_stopping go by the held-out loss",
}
"""Settings of other tools that have no counterpart here, and what to use instead."""
