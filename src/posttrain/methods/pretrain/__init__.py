"""Continued pretraining on text of a domain."""
