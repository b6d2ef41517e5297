"""First code in the sandbox: sets the limits, then runs the program. Imports nothing of posttrain: it runs alone."""

import resource
import sys

target, end = sys.argv[1], sys.argv.index("--")
for name, value in zip(sys.argv[2:end:2], sys.argv[3:end:2], strict=True):
    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (int(value), int(value)))
with open(target, encoding="utf-8") as file:
    source = file.read()
sys.argv[:] = ["main.py", *sys.argv[end + 1 :]]
del file, name, value, resource, sys, end
exec(compile(source, target[1:], "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
