"""The watch: what goes wrong in preference training, seen in the metrics as they come.

A `History` takes lines of metrics, detectors look at it, a `Watch` remembers what was told. Pure Python: the same code
runs beside training and over the log of a run that is long finished, also one of another library.
"""

from penchant.watch.findings import DETECTORS, SEVERITIES, Detector, Finding, worst_first
from penchant.watch.history import Facts, History, facts_of
from penchant.watch.watching import Watch

__all__ = ["DETECTORS", "SEVERITIES", "Detector", "Facts", "Finding", "History", "Watch", "facts_of", "worst_first"]
