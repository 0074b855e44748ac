"""Fig. 7a: scores against guidance scale, for each schedule that the process has.

    python tools/guidance_sweep.py                                                    # the bundled model
    python tools/guidance_sweep.py --model_path FILE --reference VIRTUAL_imagenet256_labeled.npz --num_samples 10000

Samples are drawn with the checkpoint's recommended settings but for scale and schedule, from the same seeds everywhere.
They are seen by the classifier of Fashion-MNIST or, with a reference file, by Inception. The same command goes on where
it was stopped.
"""

from __future__ import annotations

if __name__ == "__main__":  # above the imports, which take long: Ctrl-C is one line during them too
    import sys

    from diffit.cli.run import start

    sys.exit(start("guidance_sweep:main"))

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from plots import new_figure, save_figure
from scoring import draw, open_scorer

from diffit import load_model
from diffit.cli.run import one_sentence
from diffit.system.device import resolve_device
from diffit.system.files import as_tree, difference, write_atomically

SCALES = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)
Results = dict[str, dict[float, dict[str, float]]]  # schedule -> scale -> scores


def sweep(args: argparse.Namespace) -> Results:
    """Measure what results.json lacks, and keep it there.

    Raises:
        ValueError: if the model knows no classes, or the folder holds another sweep.
    """
    device = resolve_device(args.device)
    model, config = load_model(args.model_path, args.image_size)
    if not config.network.num_classes:
        raise ValueError(f"{args.model_path} knows no classes: there is nothing to guide it to")
    path, schedules = args.out / "results.json", config.process_config.guidance_schedules
    settings = {"checkpoint": as_tree(config), "num_samples": args.num_samples, "reference": args.reference}
    kept = json.loads(path.read_text()) if path.exists() else {"settings": settings, "scores": {}}
    changed = difference(kept["settings"], settings)
    if changed:
        raise ValueError(f"{path} holds another sweep ({changed}): choose another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    score, scores = open_scorer(device, args.reference), kept["scores"]
    for scale in sorted(args.scales):
        for schedule in schedules:
            line, name = scores.setdefault(schedule, {}), f"{scale:g}"
            if name not in line and scale == 1 and name in scores[schedules[0]]:
                line[name] = scores[schedules[0]][name]  # by any schedule, scale 1 is no guidance
            elif name not in line:
                guidance = replace(config.guidance, scale=scale, schedule=schedule, enabled=True)
                guided, title = replace(config, guidance=guidance), f"{schedule}, scale {name}"
                line[name] = score(*draw(model, guided, args.num_samples, args.batch_size, device, title))
                print(f"{title}: " + ", ".join(f"{key} {value:.4g}" for key, value in line[name].items()), flush=True)
            write_atomically(path, json.dumps(kept, indent=1).encode())
    return {name: {scale: scores[name][f"{scale:g}"] for scale in sorted(args.scales)} for name in schedules}


def best(results: Results) -> tuple[str, float, float]:
    """Schedule, scale and distance of the lowest Frechet distance."""
    found = [(values["frechet"], name, scale) for name, line in results.items() for scale, values in line.items()]
    distance, name, scale = min(found)
    return name, scale, distance


def plot(results: Results, title: str, path: Path) -> None:
    """Frechet distance against scale and, where the classifier knows the classes, its accuracy."""
    panels = {"frechet": "Frechet distance (lower is better)", "accuracy": "share classified as the class asked for"}
    if not all("accuracy" in values for line in results.values() for values in line.values()):
        del panels["accuracy"]
    figure, axes = new_figure(1, len(panels), 5 * len(panels), 3.8)
    for axis, (key, label) in zip(axes[0], panels.items(), strict=True):
        for name, line in results.items():
            axis.plot(list(line), [values[key] for values in line.values()], marker="o", markersize=4, label=name)
        axis.set(xlabel="guidance scale (1: none)", ylabel=label)
        axis.grid(alpha=0.3)
    name, scale, distance = best(results)
    axes[0, 0].plot([scale], [distance], "*", color="red", markersize=12, label=f"best: {name}, {scale:g}")
    axes[0, 0].legend()
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


@one_sentence("stopped: the same command goes on from there")
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default="Diffit-Fashion", help="checkpoint (default: the bundled model)")
    parser.add_argument("--image_size", type=int, help="256 or 512, of the released weights")
    parser.add_argument("--reference", help=".npz of real images, for all but 32x32 Fashion-MNIST")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help=f"default: {SCALES}")
    parser.add_argument("--num_samples", type=int, default=1000, help="of each scale (default: 1000)")
    parser.add_argument("--batch_size", type=int, default=100, help="samples at a time (default: 100)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/guidance_sweep"), help="folder of the results")
    parser.add_argument("--plot", type=Path, help="the picture (default: guidance_sweep.png in that folder)")
    args = parser.parse_args(argv)
    picture = args.plot or args.out / "guidance_sweep.png"
    results = sweep(args)
    plot(results, f"{args.model_path}, {args.num_samples:,} samples", picture)
    name, scale, distance = best(results)
    print(f"best: {name} at scale {scale:g}, Frechet distance {distance:.4g} ({picture})")
    return 0
