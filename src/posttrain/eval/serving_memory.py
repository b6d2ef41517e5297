"""The process in which `posttrain.eval.speed` measures memory: settings on standard input, bytes on standard output."""

from __future__ import annotations

import json
import sys

if __name__ == "__main__":
    from posttrain.eval.speed import measure_serving

    print(json.dumps({"bytes": measure_serving(json.load(sys.stdin))}))
