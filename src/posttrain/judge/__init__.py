"""AI feedback: a judge that compares or scores answers, everything it said kept; and what to think of it."""

from posttrain.judge.answer_store import Store
from posttrain.judge.asker import Answer, Ask, Asker, Backend
from posttrain.judge.judge_summary import summarize
from posttrain.judge.labels import Judge, Judged, Score, Verdict

__all__ = ["Answer", "Ask", "Asker", "Backend", "Judge", "Judged", "Score", "Store", "Verdict", "summarize"]
