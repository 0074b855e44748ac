"""The paper's ablations: train and score variants of a base recipe, and write tables beside the paper's.

    python tools/ablations.py run configs/ablations/bases/latent_cpu.yaml --out runs/ablations/latent_cpu
    python tools/ablations.py run configs/ablations/bases/image_gpu.yaml --out runs/ablations/image_gpu --gpus 0 1
    python tools/ablations.py report runs/ablations/latent_cpu runs/ablations/image_gpu --doc docs/ablations.md
    python tools/ablations.py table

A study (configs/ablations/*.yaml) lists variants, each only by what differs from the base. With the same seed all of
them see the same images, noise and times in the same order. `run` skips what is finished and goes on with the rest.
Settings of train.py may follow it, for all variants alike: run ... --steps 500 --device cpu
"""

from __future__ import annotations

if __name__ == "__main__":  # above the imports, which take long: Ctrl-C is one line during them too
    from diffit.cli.run import imported

    raise SystemExit(imported("ablations:main")())

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from ablations_report import cost_table, write_report
from scoring import open_reference, score
from studies import load_studies, variants_for

from diffit import ImageSampler, load_model
from diffit.checkpoint.resolve import EMA_FILE, complete_checkpoints
from diffit.cli.run import one_sentence
from diffit.cli.train import parse_train
from diffit.config import PIXELS
from diffit.models.config import model_config
from diffit.sampling.config import SampleConfig
from diffit.settings import FREE, settings_that
from diffit.system.device import resolve_device, set_matmul_precision
from diffit.system.files import as_tree, difference, write_atomically
from diffit.system.ranks import World
from diffit.training.config import TrainConfig, TrainTask
from diffit.training.loop import train
from diffit.training.stopping import EXIT_CODE, Stopped
from diffit.training.validation import create_validation


def run(args: argparse.Namespace, flags: list[str]) -> None:
    """Train and score every variant with every seed: all variants of a seed before the next seed.

    Raises:
        ValueError: in one sentence, for everything that a user can mend.
        Stopped: if a signal asked for it.
    """
    if any(flag.startswith("--run_dir") for flag in flags):
        raise ValueError("--run_dir follows from --out: leave it out")
    recipe = parse_train(["--config", str(args.base), *flags])
    base, variants = recipe.config, variants_for(recipe.config.model, load_studies())
    if not model_config(base.model, **base.network).num_classes:
        raise ValueError("a network without classes cannot be scored by them: set num_classes in the base's network")
    if base.codec.vae != PIXELS:  # images are encoded once for all
        base = replace(base, data=replace(base.data, cache=str(args.out / "cache")))
    tasks, curves = [], []
    for seed in args.seeds:
        for name in args.variants or variants:
            if name not in variants:
                raise ValueError(f"{base.model} has no variant '{name}': choose of {', '.join(variants)}")
            network = variants[name].settings(base.model, base.network)
            config = replace(base, network=network, seed=seed, run_dir=str(args.out / name / str(seed)))
            tasks.append(TrainTask(config, recipe.recipe))
            curves.append(variants[name].curve)
    check_folder(args.out, base, tasks)
    if not args.gpus:
        for job in zip(tasks, curves, strict=True):
            train_and_score(*job)
        return
    gpus = get_context("spawn").Queue()
    for gpu in args.gpus:
        gpus.put(gpu)
    with ProcessPoolExecutor(len(args.gpus), get_context("spawn"), _take_gpu, (gpus,)) as pool:
        pool.submit(train_and_score, tasks[0], curves[0]).result()  # alone: it encodes the data that the others share
        list(pool.map(train_and_score, tasks[1:], curves[1:]))  # which starts no more runs when one has failed


def _take_gpu(gpus: Any) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()


def check_folder(out: Path, base: TrainConfig, tasks: list[TrainTask]) -> None:
    """Refuse to mix runs of different settings in a folder: variants may differ in their networks and seeds alone.

    Raises:
        ValueError: if a run in it has other settings.
    """
    free = settings_that(FREE, TrainConfig) - {"sampling", "guidance"}  # which scores depend on
    planned = {Path(task.config.run_dir): as_tree(task.config) for task in tasks}
    for path in sorted(out.glob("*/*/config.yaml")):
        found = yaml.safe_load(path.read_text())
        other = as_tree(base) | {"network": found["network"], "seed": found["seed"]}
        changed = difference(found, planned.get(path.parent, other), free)
        if changed:
            raise ValueError(f"{path.parent} was trained with other settings ({changed}): choose another --out")


def train_and_score(task: TrainTask, curve: bool) -> None:
    """One run, in its folder: what of it is finished is left as it is. curve: score every checkpoint that is kept."""
    config, folder = task.config, Path(task.config.run_dir)
    checkpoints, path = folder / "checkpoints", folder / "scores.json"
    print(f"== {folder}", flush=True)
    last = checkpoints / f"{config.steps:08d}"
    if last not in complete_checkpoints(checkpoints):
        torch.compiler.reset()  # what was compiled for another network counts towards a limit
        train(task)
    device, wanted = resolve_device(config.device), config.evaluation
    set_matmul_precision("fp32")
    scores: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    for checkpoint in complete_checkpoints(checkpoints) if curve else [last]:
        name = checkpoint.name
        if scores.get(name, {}).get("samples") == wanted.samples:
            continue
        model, found = load_model(checkpoint / EMA_FILE)
        model = model.to(device).requires_grad_(False)
        unguided = replace(found, guidance=replace(found.guidance, enabled=False))
        drawn = SampleConfig(num_samples=wanted.samples, batch_size=wanted.batch_size)
        pictures, title = ImageSampler.create(model, unguided, device), f"samples of step {int(name)}"
        measured = score(pictures, drawn, *open_reference(device), title, manifold=False)
        scores[name] = {"samples": measured.count, "frechet": measured.fid, "accuracy": measured.accuracy or 0.0}
        scores[name]["held_out_loss"] = create_validation(pictures, config, World())()["val_loss"]
        write_atomically(path, json.dumps(scores, indent=1).encode())
        shown = ", ".join(f"{key} {value:.4g}" for key, value in scores[name].items())
        print(f"step {int(name)}: {shown}", flush=True)


@one_sentence("stopped: the same command goes on from the newest checkpoint")
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="train and score; settings of train.py may follow")
    runs.add_argument("base", type=Path, help="the recipe that the variants differ from")
    runs.add_argument("--out", type=Path, required=True, help="folder of the runs, one for each base and budget")
    runs.add_argument("--variants", nargs="+", help="names of variants; all by default")
    runs.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of training (default: 0 1 2)")
    runs.add_argument("--gpus", nargs="+", help="numbers of GPUs, each of which takes one run at a time")
    reports = commands.add_parser("report", help="write tables and plots of runs")
    reports.add_argument("outs", type=Path, nargs="+", help="folders of `run`")
    reports.add_argument("--doc", type=Path, help="the page to write into (default: ablations.md in the first folder)")
    commands.add_parser("table", help="print parameters and multiply-adds of all variants")
    args, flags = parser.parse_known_args(argv)
    if flags and args.command != "run":
        parser.error(f"unknown argument {flags[0]}")
    try:
        if args.command == "run":
            run(args, flags)
        elif args.command == "report":
            write_report(args.doc or args.outs[0] / "ablations.md", args.outs, load_studies())
        else:
            print(cost_table(load_studies()))
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return EXIT_CODE
    return 0
