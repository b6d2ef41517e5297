"""Runs programs that nobody has read: what a model wrote, with no network, no file but its own, and bounded use.

Built on bubblewrap (namespaces) with a filter of system calls, limits set inside, and a watch from outside over time,
memory, processes and output. Where that can't be had, `run` refuses; it never runs a program without.
"""

from posttrain.sandbox.bubblewrap import ProgramResult, SandboxError, require_sandbox, run_program

__all__ = ["ProgramResult", "SandboxError", "require_sandbox", "run_program"]
