"""The metrics of reinforcement learning, with titles and units for the report."""

from __future__ import annotations

from posttrain.core.types import Metric

RL_TITLES = {
    "grpo": "GRPO", "dr_grpo": "Dr. GRPO", "dapo": "DAPO", "gspo": "GSPO", "cispo": "CISPO", "rloo": "RLOO",
    "reinforce": "REINFORCE", "reinforce_pp": "REINFORCE++", "reinforce_pp_baseline": "REINFORCE++ with a baseline",
    "remax": "ReMax", "ppo": "PPO",
}  # fmt: skip


def refine_metrics(prefix: str, group: str, over: str) -> tuple[Metric, ...]:
    """Return the metrics of answers and their revisions.

    Args:
        prefix: Beginning of their names.
        group: Heading in the report.
        over: Unit: what they are means over.
    """
    return (
        Metric(f"{prefix}/last", "Right after revision", over, group, "higher"),
        Metric(f"{prefix}/first", "Right before revision", over, group, "higher", f"{prefix}/last"),
        Metric(f"{prefix}/wrong_to_right", "Wrong to right", over, group, "higher"),
        Metric(f"{prefix}/right_to_wrong", "Right to wrong", over, group, "lower", f"{prefix}/wrong_to_right"),
        Metric(f"{prefix}/edited", "Changed by revision", over, group),
        Metric(f"{prefix}/*", "Revision: *", over, group),
    )


ROLLOUT_METRICS = (
    Metric("reward", "Reward", "mean over rollouts", "Reward", "higher"),
    Metric("reward/*", "Reward: *", "mean over rollouts", "Reward", "higher"),
    Metric("failed/*", "Failures: *", "rollouts/step", "Reward", "lower"),
    Metric("greedy_failed", "Greedy baseline failures", "answers/step", "Reward", "lower"),
    Metric("frac_reward_zero_std", "Groups without signal", "share", "Reward", "lower"),
    *refine_metrics("refine", "Revision", "share of chains"),
    Metric("held_out", "Reward", "greedy answers", "Held out", "higher"),
    Metric("held_out/*", "Reward: *", "greedy answers", "Held out", "higher"),
    Metric("held_out_length", "Length", "tokens/answer", "Held out"),
    Metric("held_out_failed", "Answers without a reward", "wrong in the means", "Held out", "lower"),
    *refine_metrics("held_out_refine", "Held out", "share of greedy chains"),
    Metric("proxy", "Trained reward", "samples", "Held out", "higher"),
    Metric("gold", "Gold reward", "same samples; not trained on", "Held out", "higher"),
    Metric("kl_sequence", "KL from the first model", "nats/completion", "Held out"),
    Metric("proxy_gold", "Trained reward and gold", "correlation", "Held out", "higher"),
    Metric("gold_failed", "Samples without a reward or gold", "excluded from the means", "Held out", "lower"),
    Metric("completions/mean_length", "Length", "tokens/completion", "Completions"),
    Metric("completions/clipped_ratio", "Truncated", "share at the length or turn limit", "Completions", "lower"),
    Metric("replies", "Replies of the environment", "per completion", "Completions"),
    Metric("samples", "Sampled completions", "per step", "Completions"),
    Metric("drawn", "Sampled prompts", "per step, redraws included", "Completions"),
    Metric("carried", "Continued completions", "resume in the next step", "Completions"),
    Metric("carry_dropped", "Dropped partial completions", "too old to continue", "Completions", "lower"),
    Metric("staleness_mean", "Mean staleness", "steps since the first token", "Completions", "lower"),
    Metric("staleness_max", "Largest staleness", "steps since the first token", "Completions", "lower"),
    Metric("stale_completions", "Completions sampled again", "too old to train on", "Completions", "lower"),
    Metric("entropy", "Entropy", "nats/token, sampled", "Exploration"),
    Metric("temperature", "Temperature", "controlled", "Exploration"),
    Metric("entropy_coefficient", "Entropy coefficient", "controlled", "Exploration"),
    Metric("kl", "KL to the reference", "nats/token", "Exploration"),
    Metric("kl_first_turn", "KL to the reference, first turn", "nats/token", "Exploration"),
    Metric("kl_later_turns", "KL to the reference, later turns", "nats/token", "Exploration", over="kl_first_turn"),
    Metric("kl_coefficient", "KL coefficient", "controlled", "Exploration"),
    Metric("expected_success", "Expected success", "share, sampled problems", "Exploration"),
    Metric("problems_asked", "Problems used so far", "", "Exploration"),
    Metric("hard", "Hard prompts", "per step, no success at first", "Exploration"),
    Metric("largest_group", "Largest group", "completions of one prompt", "Exploration"),
    Metric("replayed", "Replayed successes", "per step", "Exploration"),
    Metric("replay_kept", "Stored successes", "", "Exploration"),
    Metric("replay_dropped", "Expired successes", "per step", "Exploration"),
)
ROLLOUT_DETAILS = (
    Metric("reward_std", "Spread of the reward", "standard deviation", "Details"),
    Metric("proxy_std", "Spread of the trained reward", "standard deviation, held out", "Details"),
    Metric("gold_std", "Spread of the gold reward", "standard deviation, held out", "Details"),
)
OVERLAP_METRICS = (
    Metric("learner_idle_seconds", "Learner idle", "seconds/step", "Overlap", "lower"),
    Metric("sampler_idle_seconds", "Sampler idle", "seconds/step", "Overlap", "lower", "learner_idle_seconds"),
    Metric("batches_ready", "Batches ready", "when a step begins", "Overlap"),
    Metric("batches_in_flight", "Batches in flight", "when a step begins", "Overlap", over="batches_ready"),
    Metric("completions_in_flight", "Completions in flight", "asked of the sampler when a step begins", "Overlap"),
)
"""What timings.jsonl has of asynchronous runs."""
RL_METRICS = (
    *ROLLOUT_METRICS,
    *OVERLAP_METRICS,
    Metric("loss", "Loss", "", "Training"),
    Metric("clip_fraction", "Clipped", "share of tokens", "Training"),
    Metric("approx_kl", "KL of the update", "nats/token", "Training"),
    Metric("mismatch", "Sampler and trainer", "mean |difference| of log-probabilities", "Training", "lower"),
    Metric("value_loss", "Critic loss", "", "Training", "lower"),
    Metric("explained_variance", "Explained variance of the critic", "1: all, 0: none", "Training", "higher"),
    *ROLLOUT_DETAILS,
    Metric("mismatch_max", "Sampler and trainer, largest", "|difference| of log-probabilities", "Details", "lower"),
    Metric("mismatch_kl", "Sampler and trainer, KL", "nats/token", "Details", "lower"),
    Metric("clip_low", "Clipped below", "share of tokens", "Details"),
    Metric("clip_high", "Clipped above", "share of tokens", "Details"),
    Metric("clip_dual", "Clipped at the dual bound", "share of tokens", "Details"),
    Metric("ratio", "Importance ratio", "mean", "Details"),
    Metric("ratio_squared", "Importance ratio squared", "mean", "Details"),
    Metric("ratio_max", "Importance ratio, largest", "", "Details"),
    Metric("importance", "Importance weight", "mean", "Details"),
    Metric("importance_truncated", "Truncated importance weights", "share of tokens", "Details"),
    Metric("value_clip", "Clipped values", "share of tokens", "Details"),
)
