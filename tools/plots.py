"""Figures of the tools: matplotlib without a screen, written as whole PNG files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from diffit.system.files import write_atomically


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure of this size in inches, and its axes as an array [rows, columns].

    Raises:
        ValueError: if matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib import pyplot
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'diffit[tools]'") from error
    matplotlib.use("Agg")
    return pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as a PNG; its folder is made if need be."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())
