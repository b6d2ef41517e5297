"""AI feedback: a judge that compares or scores answers, with every answer kept; and a summary of its labels."""
