"""Answers made better by words about them: critique and revision by principles, and the self-refine loop."""

from posttrain.refine.chain import Chain, Round, Text, read_chains
from posttrain.refine.wording import Example, draw, read_examples

__all__ = ["Chain", "Example", "Round", "Text", "draw", "read_chains", "read_examples"]
