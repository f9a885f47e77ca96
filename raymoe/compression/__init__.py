"""Compressed experts: a token's strongest routed experts run in full, the rest act through small vectors.

It saves computation (active parameters), never memory: every expert stays where it was, as any token may choose it as its
strongest. Source: arXiv 2503.00634.
"""

from raymoe.compression.attach import as_dropped, as_full, compress, restore, settings_of, theta_parameters
from raymoe.compression.compare import Comparison, compare
from raymoe.compression.counts import Counts, active_counts
from raymoe.compression.files import load_vectors, save
from raymoe.compression.fit import fit
from raymoe.compression.settings import METHODS, CompressionSettings

__all__ = [
    "METHODS",
    "Comparison",
    "CompressionSettings",
    "Counts",
    "active_counts",
    "as_dropped",
    "as_full",
    "compare",
    "compress",
    "fit",
    "load_vectors",
    "restore",
    "save",
    "settings_of",
    "theta_parameters",
]
