"""A figure that a notebook shows, and whose files are those of the commands."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
from matplotlib.figure import Figure


class Picture(Figure):
    """A figure of matplotlib without a window. It is drawn by the rcParams that it was made with."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._rc = {key: value for key, value in matplotlib.rcParams.copy().items() if not key.startswith("backend")}

    def savefig(self, *args: Any, **options: Any) -> None:
        """As matplotlib's."""
        with matplotlib.rc_context(self._rc):
            super().savefig(*args, **options)

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=96)
        return file.getvalue()
