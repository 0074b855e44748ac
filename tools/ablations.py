"""The paper's ablations: train and score variants of a base recipe, and write docs/ablations.md.

    python tools/ablations.py run configs/ablations/bases/latent_cpu.yaml --out runs/ablations/latent_cpu
    python tools/ablations.py run configs/ablations/bases/image_gpu.yaml --out runs/ablations/image_gpu --gpus 0 1
    python tools/ablations.py report runs/ablations/latent_cpu runs/ablations/image_gpu
    python tools/ablations.py table

A study (configs/ablations/*.yaml) lists variants, each only by what differs from the base. With the same seed all of
them see the same images, noise and times in the same order. `run` skips what is finished and goes on with the rest.
Settings of train.py may follow it: run ... --steps 500 --device cpu
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from ablations_report import cost_table, write_report
from scoring import draw, held_out_loss, open_scorer

from diffit import load_model
from diffit.cli.parser import fail
from diffit.cli.train import parse_train
from diffit.device import resolve_device, set_matmul_precision
from diffit.files import as_tree, difference, write_atomically
from diffit.models.config import DiffiTConfig, model_config
from diffit.training.checkpointing import EMA_FILE, complete_checkpoints
from diffit.training.config import TrainTask
from diffit.training.loop import train
from diffit.training.stopping import EXIT_CODE, Stopped

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT / "configs" / "ablations"


@dataclass(frozen=True)
class Variant:
    """What differs from the base.

    Args:
        name: of its folder; equal names in several studies are the same runs.
        label: in tables and plots.
        network: fields of the network's config.
        times: widths of the network's config, as multiples of the base's.
        curve: score all checkpoints that are kept, not the last alone.
        paper: published FID by data set.
    """

    name: str
    label: str
    network: dict[str, Any] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    curve: bool = False
    paper: dict[str, float] = field(default_factory=dict)

    def settings(self, model: str, base: dict[str, Any]) -> dict[str, Any]:
        """The fields of the network's config that differ from those of the model's name."""
        whole = as_tree(model_config(model, **base))
        scaled = {key: _times(whole[key], factor) for key, factor in self.times.items()}
        return base | self.network | scaled


def _times(value: Any, factor: float) -> Any:
    return [int(factor * width) for width in value] if isinstance(value, list) else int(factor * value)


@dataclass(frozen=True)
class Study:
    """An ablation of the paper: its first variant is what the others are compared with.

    Args:
        space: latent, image or both: the networks that it means something to.
        plot: steps (score against iterations), or a field of the network's config; none by default.
        note: what the paper says beside its numbers.
    """

    title: str
    space: str
    variants: tuple[Variant, ...]
    plot: str = ""
    note: str = ""


def load_studies() -> list[Study]:
    """All of configs/ablations.

    Raises:
        ValueError: if a name stands for two variants.
    """
    studies = []
    known: dict[str, tuple[dict[str, Any], dict[str, float]]] = {}
    for path in sorted(STUDIES.glob("*.yaml")):
        tree = yaml.safe_load(path.read_text())
        variants = tuple(Variant(**variant) for variant in tree.pop("variants"))
        for variant in variants:
            meaning = (variant.network, variant.times)
            if known.setdefault(variant.name, meaning) != meaning:
                raise ValueError(f"{path}: the variant {variant.name} is another one elsewhere: rename it")
        studies.append(Study(variants=variants, **tree))
    return studies


def variants_of(studies: list[Study], space: str) -> list[Variant]:
    """Each variant once; it has a curve if any study wants one."""
    found: dict[str, Variant] = {}
    for variant in (v for study in studies if study.space in (space, "both") for v in study.variants):
        before = found.get(variant.name, variant)
        found[variant.name] = replace(before, curve=before.curve or variant.curve)
    return list(found.values())


def run(args: argparse.Namespace, flags: list[str]) -> None:
    """Train and score every variant with every seed: all variants of a seed before the next seed.

    Raises:
        ValueError: in one sentence, for everything that a user can mend.
        Stopped: if a signal asked for it.
    """
    base = yaml.safe_load(args.base.read_text())
    network = base.get("network", {})
    space = "latent" if isinstance(model_config(base["model"], **network), DiffiTConfig) else "image"
    variants = variants_of(load_studies(), space)
    names = args.variants or [variant.name for variant in variants]
    unknown = sorted(set(names) - {variant.name for variant in variants})
    if unknown:
        choices = ", ".join(variant.name for variant in variants)
        raise ValueError(f"there is no variant '{unknown[0]}' of a network in {space} space: choose of {choices}")
    own = next(
        (flag for flag in flags if flag.split("=")[0].split(".")[0] in ("--network", "--seed", "--run_dir")), None
    )
    if own is not None:
        raise ValueError(f"{own} is what the variants set: write another base or study in place of it")
    jobs = []
    for seed in args.seeds:
        for variant in (variant for variant in variants if variant.name in names):
            folder = args.out / variant.name / str(seed)
            argv = ["--config", str(args.base), "--seed", str(seed), "--run_dir", str(folder)]
            argv += ["--network", json.dumps(variant.settings(base["model"], network))]
            if space == "latent":  # encoded once for all
                argv += ["--data.cache", str(args.out / "cache")]
            jobs.append((parse_train([*argv, *flags]), variant.curve))
    if not args.gpus:
        for job in jobs:
            train_and_score(*job)
        return
    gpus = get_context("spawn").Queue()
    for gpu in args.gpus:
        gpus.put(gpu)
    with ProcessPoolExecutor(len(args.gpus), get_context("spawn"), _take_gpu, (gpus,)) as pool:
        pool.submit(train_and_score, *jobs[0]).result()  # alone: it encodes the data that the others share
        for each in [pool.submit(train_and_score, *job) for job in jobs[1:]]:
            each.result()


def _take_gpu(gpus: Any) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()


def train_and_score(task: TrainTask, curve: bool) -> None:
    """One run: what of it is finished is left as it is.

    Raises:
        ValueError: if the folder holds a run with other settings.
    """
    config, folder = task.config, Path(task.config.run_dir)
    print(f"== {folder}", flush=True)
    if (folder / "config.yaml").exists():
        trees = yaml.safe_load((folder / "config.yaml").read_text()), as_tree(config)
        for tree in trees:
            tree.pop("evaluation")
        changed = difference(*trees)
        if changed:
            raise ValueError(f"{folder} was trained with other settings ({changed}): choose another --out")
    last = f"{config.steps:08d}"
    if last not in [path.name for path in complete_checkpoints(folder / "checkpoints")]:
        torch.compiler.reset()  # what was compiled for another network counts towards a limit
        train(task)
    device = resolve_device(config.device)
    set_matmul_precision("fp32")
    path, wanted = folder / "scores.json", config.evaluation
    scores: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    for checkpoint in complete_checkpoints(folder / "checkpoints"):
        name = checkpoint.name
        if scores.get(name, {}).get("samples") == wanted.samples or not (curve or name == last):
            continue
        model, found = load_model(checkpoint / EMA_FILE)
        model = model.to(device).requires_grad_(False)
        unguided = replace(found, guidance=replace(found.guidance, enabled=False))
        samples = draw(model, unguided, wanted.samples, wanted.batch_size, device, f"samples of step {int(name)}")
        scores[name] = open_scorer(device).score(*samples) | {"held_out_loss": held_out_loss(model, found, device)}
        write_atomically(path, json.dumps(scores, indent=1).encode())
        shown = ", ".join(f"{key} {value:.4g}" for key, value in scores[name].items())
        print(f"step {int(name)}: {shown}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="train and score; settings of train.py may follow")
    runs.add_argument("base", type=Path, help="the recipe that the variants differ from")
    runs.add_argument("--out", type=Path, required=True, help="folder of the runs, one for each base and budget")
    runs.add_argument("--variants", nargs="+", help="names of variants; all by default")
    runs.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of training (default: 0 1 2)")
    runs.add_argument("--gpus", nargs="+", help="numbers of GPUs, each of which takes one run at a time")
    reports = commands.add_parser("report", help="write docs/ablations.md and its plots")
    reports.add_argument("outs", type=Path, nargs="*", help="folders of `run`")
    reports.add_argument("--doc", type=Path, default=ROOT / "docs" / "ablations.md", help="the file to write")
    commands.add_parser("table", help="print parameters and multiply-adds of all variants")
    args, flags = parser.parse_known_args(argv)
    if flags and args.command != "run":
        parser.error(f"unknown argument {flags[0]}")
    try:
        if args.command == "run":
            run(args, flags)
        elif args.command == "report":
            write_report(args.doc, args.outs, load_studies())
        else:
            print("\n".join(cost_table(load_studies())))
    except (ValueError, FileNotFoundError) as error:
        fail(str(error))
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
