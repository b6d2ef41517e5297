"""The errors that a person can act on.

Each says what was expected, what came, and what to do about it, and each inherits the standard error that it
replaces, so that ``except ValueError`` written by someone who never read this file still works.
"""

from __future__ import annotations


class PosttrainError(Exception):
    """Anything posttrain raises on purpose; the command line prints its message without a traceback."""


class RecipeError(PosttrainError, ValueError):
    """A recipe, or a ``key=value`` override, that is not valid."""


class DataError(PosttrainError, ValueError):
    """Data that can't be read, or rows that can't be used."""


class ModelError(PosttrainError, ValueError):
    """A model that can't be found, opened, or run as it was asked to be."""


class CheckpointError(PosttrainError, OSError):
    """A checkpoint or run folder that is damaged, belongs to another recipe, or can't be written."""


class RewardError(PosttrainError, RuntimeError):
    """A reward that can't be built, or that failed more often than it may."""


class ServerError(PosttrainError, ConnectionError):
    """A server that can't be reached, refuses the key or the model, or keeps failing."""


class NonFiniteError(PosttrainError, ArithmeticError):
    """Loss or gradient stayed infinite or not-a-number for several steps in a row."""


class MismatchError(PosttrainError, ArithmeticError):
    """Sampler and learner compute different probabilities, by more than a recipe allows."""


class MissingExtraError(PosttrainError, ImportError):
    """An optional dependency is needed and not installed."""
