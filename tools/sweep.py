"""Scores over any settings of sample.py, sampled from the same seeds: tables, a plot and the best row's command.

    python tools/sweep.py cfg_scale=1,1.25,1.5,2 guidance.schedule=constant,power_cosine
    python tools/sweep.py model_path=ema.safetensors,ema_0.999.safetensors guidance.interval=,"100 700" \
        --reference VIRTUAL_imagenet256_labeled.npz --num_samples 10000

Each NAME=VALUES is an axis, and all combinations are scored; an empty value leaves the setting to the checkpoint. Other
flags of sample.py may follow and hold for all. Every score has a standard error over samples, from random halves, and
scores that differ by less than two of them are called alike. The same command goes on where it was stopped.
"""

from __future__ import annotations

if __name__ == "__main__":  # above the imports, which take long: Ctrl-C is one line during them too
    from diffit.cli.run import imported

    raise SystemExit(imported("sweep:main")())

import argparse
import contextlib
import itertools
import json
import math
import shlex
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from plots import new_figure, save_figure
from scoring import open_reference, score

from diffit import ImageSampler
from diffit.checkpoint.resolve import find_guide
from diffit.checkpoint.weights import load_weights
from diffit.cli.run import one_sentence
from diffit.cli.sample import parse_sample
from diffit.evaluation.scores import LABELS
from diffit.system.device import resolve_device
from diffit.system.files import difference, write_atomically

Row = dict[str, Any]  # a value of each axis, and then: scores, their standard errors, the command


def combinations(axes: Sequence[str]) -> list[Row]:
    """The settings of every row: name -> value, of `NAME=VALUE,VALUE` each.

    Raises:
        ValueError: if an axis is not of that form.
    """
    if wrong := [axis for axis in axes if "=" not in axis]:
        raise ValueError(f"'{wrong[0]}' is no axis: write NAME=VALUE,VALUE, such as cfg_scale=1,1.5,2")
    named = {name.lstrip("-"): values.split(",") for name, _, values in (axis.partition("=") for axis in axes)}
    return [dict(zip(named, row, strict=True)) for row in itertools.product(*named.values())]


def sweep(args: argparse.Namespace, flags: Sequence[str]) -> list[Row]:
    """Score what results.json lacks, and keep it there.

    Raises:
        ValueError: if the folder holds a sweep of other settings.
    """
    path, rows = args.out / "results.json", combinations(args.axes)
    common = [*flags, "--num_samples", str(args.num_samples), "--batch_size", str(args.batch_size)]
    given = [[word for k, v in row.items() if v for word in (f"--{k}", *v.split())] + common for row in rows]
    tasks = [parse_sample(arguments) for arguments in given]  # all of them are checked before the first is sampled
    settings = {"reference": args.reference, "features": args.features, "bootstrap": args.bootstrap}
    kept = json.loads(path.read_text()) if path.exists() else {"settings": settings, "rows": {}}
    if changed := difference(kept["settings"], settings):
        raise ValueError(f"{path} holds another sweep ({changed}): choose another --out")
    read, device = lru_cache(1)(load_weights), resolve_device(args.device)
    backend, reference = open_reference(device, args.reference, args.features)
    args.out.mkdir(parents=True, exist_ok=True)
    for row, arguments, task in zip(rows, given, tasks, strict=True):
        key, guide = f"{shlex.join(arguments)} # weights {task.source.sha256()[:12]}", find_guide(task.resolved)
        key += f", guide {guide[0].sha256()[:12]}" if guide else ""
        if key not in kept["rows"]:
            network = read(task.source.fetch(), task.checkpoint).requires_grad_(False)
            pictures = ImageSampler.create(network, task.resolved, device)
            title = ", ".join(f"{name} {value}" for name, value in row.items() if value) or "the checkpoint's settings"
            found = score(pictures, task.config, backend, reference, title, args.bootstrap)
            kept["rows"][key] = {"scores": found.labelled(), "errors": found.errors}
            print(f"{title}: " + ", ".join(f"{LABELS[k]} {v:.4g}" for k, v in found.labelled().items()), flush=True)
            write_atomically(path, json.dumps(kept, indent=1).encode())
        row["command"] = shlex.join(["python", "sample.py", *arguments])
        row |= kept["rows"][key]
    return rows


def table(rows: Sequence[Row], axes: Sequence[str]) -> str:
    """Rows as Markdown, the lowest FID first, and whether each differs from that one by more than the noise."""
    ranked = sorted(rows, key=lambda row: row["scores"]["fid"])
    names = list(ranked[0]["scores"])
    lines = [[*axes, *(LABELS[name] for name in names), "FID against the first"]]
    lines += [["---"] * len(lines[0])]
    for row in ranked:
        values = [
            f"{row['scores'][k]:.4g}" + (f" ± {row['errors'][k]:.2g}" if k in row["errors"] else "") for k in names
        ]
        noise = 2 * math.hypot(row["errors"].get("fid", 0), ranked[0]["errors"].get("fid", 0))
        apart = row["scores"]["fid"] - ranked[0]["scores"]["fid"]
        verdict = "" if row is ranked[0] else f"{apart:+.3g}, " + ("alike" if apart <= noise else "worse")
        lines.append([*(row[axis] or "-" for axis in axes), *values, verdict])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plot(rows: Sequence[Row], axes: Sequence[str], title: str, path: Path) -> None:
    """Every score over the first axis that is of numbers, with its error; a line for each choice of the others."""

    def number(text: str) -> float | None:
        with contextlib.suppress(ValueError):
            return float(text)
        return None

    x_axis = next((axis for axis in axes if all(number(row[axis]) is not None for row in rows)), None)
    names = list(rows[0]["scores"])
    figure, panels = new_figure(1, len(names), 4 * len(names), 3.6)
    others = [axis for axis in axes if axis != x_axis]
    for panel, name in zip(panels[0], names, strict=True):
        for label, line in itertools.groupby(
            sorted(rows, key=lambda row: [row[axis] for axis in others]), key=lambda row: [row[axis] for axis in others]
        ):
            points = [(number(r[x_axis]) if x_axis else 0, r["scores"][name], r["errors"].get(name, 0)) for r in line]
            x, y, error = zip(*sorted(points), strict=True)
            panel.errorbar(x, y, yerr=error, marker="o", markersize=4, capsize=2, label=", ".join(label))
        panel.set(xlabel=x_axis or "", ylabel=LABELS[name])
        panel.grid(alpha=0.3)
    if others:
        panels[0, 0].legend(fontsize=8, title=", ".join(others))
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


@one_sentence("stopped: the same command goes on from there")
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, sample and score, write table and plot, print the best row's command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("axes", nargs="+", metavar="NAME=VALUE,VALUE", help="flags of sample.py, and their values")
    parser.add_argument("--reference", help="of real images, for all but 32x32 Fashion-MNIST")
    parser.add_argument("--features", help="dinov2, or MODULE[:FILE], in place of Inception's; needs --reference")
    parser.add_argument("--num_samples", type=int, default=1000, help="of each row (default: 1000)")
    parser.add_argument("--batch_size", type=int, default=100, help="samples at a time (default: 100)")
    parser.add_argument("--bootstrap", type=int, default=20, help="random halves for standard errors (default: 20)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="folder of the results")
    parser.add_argument("--plot", type=Path, help="the picture (default: sweep.png in that folder)")
    args, flags = parser.parse_known_args(argv)
    if args.features and not args.reference:
        raise ValueError("--features needs the images to compare with: --reference")
    rows = sweep(args, [*flags, "--device", args.device])
    axes, picture = [axis.partition("=")[0].lstrip("-") for axis in args.axes], args.plot or args.out / "sweep.png"
    text = table(rows, axes)
    write_atomically(args.out / "sweep.md", f"{text}\n".encode())
    plot(rows, axes, f"{args.num_samples:,} samples a point, error bars: one standard error", picture)
    print(text, f"plot: {picture}", f"best: {min(rows, key=lambda row: row['scores']['fid'])['command']}", sep="\n")
