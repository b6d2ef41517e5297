"""Distillation: a student learns from a teacher's distributions or texts, on rows or on its own answers."""
