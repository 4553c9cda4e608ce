"""Runs scripts of this directory, each in a fork of one process, because their imports take as long as they do.

Arguments: the scripts, as JSON lists of a name and its arguments. Prints a JSON list of their last lines, or
{"failed": traceback}.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import sys
import traceback

from lora_ext.tasks.analyze import run as analyze  # noqa: F401
from lora_ext.tasks.comparison import compare  # noqa: F401
from lora_ext.tasks.report import write_report  # noqa: F401

lines = []
for script in sys.argv[1:]:
    name, *arguments = json.loads(script)
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                sys.argv = [name, *arguments]
                runpy.run_module(f"faults.{name}", run_name="__main__")
            line = printed.getvalue().splitlines()[-1]
        except BaseException:
            line = json.dumps({"failed": traceback.format_exc()})
        with os.fdopen(writing, "w") as pipe:
            pipe.write(line)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        lines.append(json.loads(pipe.read() or '{"failed": "its process ended"}'))
    os.waitpid(child, 0)
print(json.dumps(lines))
