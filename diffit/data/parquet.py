"""Pictures in Parquet files in the layout of Hugging Face data sets: image {bytes, path}, label, and their names.

Files are read by row groups, some hundred pictures each. That is cheap in order, as for latents and references; what
draws pictures at random takes them all into memory first.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffit.data.files import HELD_OUT, TRAIN, Pictures, size_and_time


@dataclass(frozen=True)
class ParquetImages(Pictures):
    """The pictures in Parquet files.

    Args:
        groups: (file, number of the row group in it), in order.
        ends: int64 [groups], the number of the picture that follows each.
        column: of the pictures.
        loaded: the pictures of each group, once they are in memory.
    """

    groups: tuple[tuple[str, int], ...]
    ends: NDArray[np.int64]
    column: str
    loaded: tuple[Any, ...] = ()

    def name(self, index: int) -> str:
        group, row = self._place(index)
        return f"{self.root / self.groups[group][0]}, row group {self.groups[group][1]}, row {row}"

    def open(self, index: int) -> io.BytesIO:
        group, row = self._place(index)
        file, number = self.groups[group]
        rows = self.loaded[group] if self.loaded else _read_group(self.root / file, number, self.column)
        value = rows[row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise ValueError("it holds no bytes of a picture")
        return io.BytesIO(content)

    def states(self) -> Iterator[str]:
        for (file, number), count in zip(self.groups, np.diff(self.ends, prepend=0), strict=True):
            state = size_and_time(self.root / file)
            yield from (f"{file} {state} {number} {row}" for row in range(count))

    def fingerprint(self) -> str:
        return hashlib.sha256(os.fsencode(f"{self.groups} {self.ends.tolist()}")).hexdigest()[:16]

    def load(self) -> ParquetImages:
        """The same pictures, in memory.

        Raises:
            ValueError: if they do not fit.
        """
        size, memory = sum((self.root / file).stat().st_size for file in {file for file, _ in self.groups}), 1 << 62
        if hasattr(os, "sysconf"):
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if size > memory // 2:
            raise ValueError(
                f"{self.root} holds {size / 1e9:.3g} GB of Parquet, too much for pixels in {memory / 1e9:.3g} GB of "
                "memory: unpack it to a folder, or train on latents"
            )
        return replace(self, loaded=tuple(_read_group(self.root / f, n, self.column) for f, n in self.groups))

    def _place(self, index: int) -> tuple[int, int]:
        group = int(np.searchsorted(self.ends, index, side="right"))
        return group, index - (int(self.ends[group - 1]) if group else 0)


@lru_cache(maxsize=1)  # of each process: pictures are read in order
def _read_group(path: Path, number: int, column: str) -> Any:
    return _parquet(path).read_row_group(number, columns=[column], use_threads=False).column(0)


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


def parquet_images(root: Path, files: Sequence[str], ignored: Counter[str]) -> ParquetImages:
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
    groups: list[tuple[str, int]] = []
    counts: list[int] = []
    labels: list[NDArray[np.int64]] = []
    names: tuple[str, ...] = ()
    for file in splits[chosen[0]]:
        parquet = _parquet(root / file)
        column, label_column, names = _columns(root / file, parquet.schema_arrow)
        rows = [parquet.metadata.row_group(number).num_rows for number in range(parquet.num_row_groups)]
        groups += [(file, number) for number in range(len(rows))]
        counts += rows
        read = parquet.read(columns=[label_column]).column(0).to_numpy() if label_column else np.zeros(sum(rows))
        labels.append(read.astype(np.int64))
    found = np.concatenate(labels)
    if not len(found):
        raise ValueError(f"{root} holds no images: its Parquet files have no rows")
    if label_column and not names and found.min() >= 0:
        names = tuple(map(str, range(int(found.max()) + 1)))
    if names and not 0 <= found.min() <= found.max() < len(names):
        names, found = (), np.zeros_like(found)  # -1 in splits whose labels are kept back
    return ParquetImages(root, found, names, ignored, tuple(groups), np.cumsum(counts), column)


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
