"""First code in the sandbox: sets the limits, then runs the program. Imports nothing of posttrain: it runs alone."""

import resource
import sys

for name, value in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (int(value), int(value)))
with open(sys.argv[1], encoding="utf-8") as file:
    source = file.read()
sys.argv[:] = ["main.py"]
del file, name, value, resource, sys
exec(compile(source, "main.py", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
