"""Makes the helpers beside this file, and the small models of the cache's tests, importable."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parent.parent / "cache"):
    sys.path.insert(0, str(folder))
