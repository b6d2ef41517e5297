"""AI feedback: a judge that compares or scores answers, everything it said kept; and what to think of it."""

from posttrain.feedback.ask import Answer, Ask, Asker, Backend
from posttrain.feedback.judge import Judge, Judged, Score, Verdict
from posttrain.feedback.store import Store
from posttrain.feedback.summary import summarize

__all__ = ["Answer", "Ask", "Asker", "Backend", "Judge", "Judged", "Score", "Store", "Verdict", "summarize"]
