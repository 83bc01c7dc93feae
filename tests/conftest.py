"""Puts tests/ on the path, so that builders and fixtures are shared, and loads the common fixtures."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))  # else `import app` finds the folder tests/app first

pytest_plugins = ["fixtures_postgres", "fixtures_host"]

# A busy machine is no fault: properties are held for as long as they take. The same examples each time, so that what was changed
# is what made a property fail; EXPLORE=1 draws others.
settings.register_profile(
    "heliostat",
    deadline=None,
    derandomize="EXPLORE" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("heliostat")

# A shell that starts the suite in the background has Ctrl-C ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What the libraries have made at import lives as long as the process: no collection needs to look at a million objects."""
    gc.collect()
    gc.freeze()
