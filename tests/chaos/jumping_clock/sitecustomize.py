"""Python reads this at its start where the folder is on PYTHONPATH: then the clock has been set anew at every look."""

import random
import time

_now = time.time
_HOUR_S = 3600.0


def _some_time() -> float:
    return _now() + random.choice((-24, -1, 0, 1, 24)) * _HOUR_S


time.time = _some_time
time.time_ns = lambda: int(_some_time() * 1e9)
