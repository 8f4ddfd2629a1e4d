"""Sides that are not measured, and the time that a run of the bench is given: the most wanted comes first."""

import os
import time

UNTIL_VARIABLE = "UNIWORLD_BENCH_UNTIL"  # the time, in seconds since 1970, at which the run will be ended
COMPILE_S = 60.0  # kept for a model that is compiled


class Missing(Exception):
    """A side cannot run here; says why."""


class NoTime(Missing):
    """A side has to wait for a later run: no row says that it is missing."""


class Deadline:
    """When the run will be ended; never where nobody has said so."""

    def __init__(self):
        self.end = float(os.environ.get(UNTIL_VARIABLE, "inf"))

    @property
    def left_s(self) -> float:
        return self.end - time.time()

    def keep(self, seconds: float) -> None:
        """Raises: NoTime where less is left."""
        if self.left_s < seconds:
            raise NoTime(f"{self.left_s:.0f} s are left, about {seconds:.0f} wanted; a later run measures it")
