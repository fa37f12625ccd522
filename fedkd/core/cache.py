"""The cache directory: decoded data sets, partitions and trained teachers."""

from __future__ import annotations

import os
from pathlib import Path


def directory() -> Path:
    """The cache directory: ``FEDKD_CACHE``, else the user's cache directory."""
    if chosen := os.environ.get("FEDKD_CACHE"):
        return Path(chosen).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("fedkd")
