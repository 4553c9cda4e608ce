"""A process that runs cases one after the other, as it is told on its standard input.

    python -m fuzz.worker AREA

A request is a line of JSON, {"seed": ...} or {"choices": [...]}. Before a case is run, a line says what it is; after
it, what became of it: where there is no second line, the case has ended the process.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
import warnings
from typing import Any

_ADDRESS_SPACE = 2 << 30  # bytes beyond what python and torch take: a larger request is refused, not tried


def _limit_memory() -> None:
    if "san.so" in os.environ.get("LD_PRELOAD", ""):
        return  # a sanitizer's own tables take terabytes of address space
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _ADDRESS_SPACE, resource.RLIM_INFINITY))


def main() -> None:
    area = sys.argv[1]
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever is printed is no reply
    warnings.simplefilter("ignore")
    import torch

    from .areas import make_case
    from .choices import Choices

    torch.set_num_threads(2)
    make_case(area, Choices(0))  # imports what it needs

    def say(**reply: Any) -> None:
        out.write(json.dumps(reply) + "\n")

    _limit_memory()
    say(ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        choices = Choices(request.get("seed", 0), request.get("choices"))
        try:
            case = make_case(area, choices)
            say(function=case.function, source=case.source, choices=choices.made)
            outcome = case.run()
            say(kind=outcome.kind, findings=[finding.as_json() for finding in outcome.findings])
        except Exception:  # of the fuzzer's own
            say(error=traceback.format_exc())


if __name__ == "__main__":
    main()
