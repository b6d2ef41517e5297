"""A laboratory: a base model of a million parameters, made here in minutes, that reinforcement learning can improve."""
