"""Pictures in Parquet files in the layout of Hugging Face data sets: image {bytes, path}, label, and their names.

Files are read by row groups, some hundred pictures each. That is cheap in order, as for latents and references; what
draws pictures at random takes them all into memory first.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffit.data.files import HELD_OUT, TRAIN, ImageFiles


def parquet_images(root: Path, files: Sequence[str], ignored: Counter[str]) -> ImageFiles:
    """The pictures in these files under a folder; of several splits, those to train on.

    Raises:
        ValueError: if they hold no pictures, are damaged, or pyarrow is not installed.
    """
    splits: dict[str, list[str]] = {}
    for file in files:
        words = [word.partition("-")[0].partition(".")[0].lower() for word in PurePosixPath(file).parts]
        splits.setdefault(next((word for word in words if word in TRAIN | HELD_OUT), ""), []).append(file)
    chosen = [split for split in splits if split in TRAIN] or [*splits]
    if len(chosen) > 1:
        raise ValueError(f"{root} holds the splits {', '.join(sorted(splits))}: name the one to read")
    paths = [root / file for file in splits[chosen[0]]]
    names: list[str] = []
    places: list[tuple[int, ...]] = []
    labels: list[NDArray[np.int64]] = []
    for number, path in enumerate(paths):
        parquet, time = _parquet(path), path.stat().st_mtime_ns
        column, label_column, class_names = _columns(path, parquet.schema_arrow)
        for group in range(parquet.num_row_groups):
            rows = range(parquet.metadata.row_group(group).num_rows)
            places += [(number, group, time, row) for row in rows]
            names += [f"{path.relative_to(root)}, row group {group}, row {row}" for row in rows]
        if label_column:
            labels.append(parquet.read(columns=[label_column]).column(0).to_numpy().astype(np.int64))
    if not names:
        raise ValueError(f"{root} holds no images: its Parquet files have no rows")
    found = np.concatenate(labels) if labels else np.full(len(names), -1)
    if found.min() >= 0 and not class_names:
        class_names = tuple(map(str, range(int(found.max()) + 1)))
    if not 0 <= found.min() <= found.max() < len(class_names):
        class_names, found = (), np.zeros_like(found)  # -1 where labels are kept back
    read = partial(_read_row, tuple(paths), column)
    return ImageFiles(root, tuple(names), found, class_names, ignored, np.array(places, np.int64), read)


def in_memory(images: ImageFiles) -> ImageFiles:
    """Pictures to be drawn at random: those in Parquet files with their contents in memory, others as they are.

    Raises:
        ValueError: if they do not fit.
    """
    if not isinstance(images.read, partial) or images.read.func is not _read_row or images.places is None:
        return images
    paths, column = images.read.args
    size, memory = sum(path.stat().st_size for path in paths), 1 << 62
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory // 2:
        raise ValueError(
            f"{images.root} holds {size / 1e9:.3g} GB of Parquet, too much for pixels in {memory / 1e9:.3g} GB of "
            "memory: unpack it to a folder, or train on latents"
        )
    groups = {(n, group): _read_group(paths[n], group, column) for n, group in np.unique(images.places[:, :2], axis=0)}
    return replace(images, read=partial(_loaded_row, groups))


def _loaded_row(groups: dict[tuple[int, int], Any], number: int, group: int, time: int, row: int) -> bytes:
    return _content(groups[number, group][row])


def _read_row(paths: Sequence[Path], column: str, number: int, group: int, time: int, row: int) -> bytes:
    return _content(_read_group(paths[number], group, column)[row])


def _content(cell: Any) -> bytes:
    value = cell.as_py()
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise ValueError("it holds no bytes of a picture")
    return content


@lru_cache(maxsize=1)  # of each process: pictures are read in order
def _read_group(path: Path, group: int, column: str) -> Any:
    return _parquet(path).read_row_group(int(group), columns=[column], use_threads=False).column(0)


def _parquet(path: Path) -> Any:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise ValueError(f"{path} is a Parquet file, which needs pyarrow: pip install 'diffit[parquet]'") from error
    try:
        return ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a whole Parquet file ({error}): get it again") from error


def _columns(path: Path, schema: Any) -> tuple[str, str | None, tuple[str, ...]]:
    """Names of the columns of pictures and labels, and of the classes: from the schema's metadata, or by habit."""
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = about.get("info", {}).get("features", {})
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    pictures = [name for name, kind in kinds.items() if kind == "Image"] or ["image", "img"]
    labels = ["label", *(name for name, kind in kinds.items() if kind == "ClassLabel")]
    column = next((name for name in pictures if name in schema.names), None)
    if column is None:
        raise ValueError(f"{path} has no column of pictures (it has {', '.join(schema.names[:5])}): expected 'image'")
    label = next((name for name in labels if name in schema.names), None)
    return column, label, tuple(features.get(label, {}).get("names") or ())
