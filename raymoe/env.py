"""Every environment variable that raymoe reads, with its default and effect. They are read here and nowhere else,
except `RAYMOE_KERNELS`, which `raymoe.kernels` reads itself because it imports nothing of raymoe."""

import os

KERNELS = "RAYMOE_KERNELS"
"""Backend that `moe_mlp(..., backend="auto")` takes: auto (default), triton, torch or reference."""

LOG_LEVEL = "RAYMOE_LOG_LEVEL"
"""Level of the `raymoe` logger in actors and commands; default WARNING."""


def log_level() -> str:
    return os.environ.get(LOG_LEVEL, "WARNING").upper()
