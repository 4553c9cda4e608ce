"""Shared parts of the benchmarks. Keeps messages of the profiler and of torchao's import out of the tables."""

import logging
import os

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # "USDT" lines, one at each start and stop of the profiler, are level 5
for _name in ("torchao", "torch.utils._pytree"):  # extensions for other machines; what torchao still registers
    logging.getLogger(_name).setLevel(logging.ERROR)
