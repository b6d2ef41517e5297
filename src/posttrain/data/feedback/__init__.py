"""Human feedback: ratings, thumbs and choices of several people into pairs with strengths, and how far they agree."""

from posttrain.data.feedback.agreement import krippendorff_alpha
from posttrain.data.feedback.pairs import Candidate, Pair, preference_share
from posttrain.data.feedback.read import Answers, read_answers

__all__ = ["Answers", "Candidate", "Pair", "krippendorff_alpha", "preference_share", "read_answers"]
