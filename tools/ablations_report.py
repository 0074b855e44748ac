"""The report of tools/ablations.py: tables beside the paper's, what exceeds the noise, plots, and costs of variants."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from plots import new_figure, save_figure
from scipy import stats

from diffit.files import write_atomically
from diffit.models.config import DiffiTConfig, build_model, model_config
from diffit.training.estimate import estimate

# Published networks, in which costs are counted.
NETWORKS = ("Diffit", "ImageDiffit-CIFAR10", "ImageDiffit-FFHQ64")
INTRO = """# Ablations

The paper's ablations as settings of this code, what they cost, and what they do at a small scale. How each variant was
read out of the paper: [faithfulness.md](faithfulness.md). This page is written by

    python tools/ablations.py run configs/ablations/bases/latent_cpu.yaml --out runs/ablations/latent_cpu
    python tools/ablations.py report runs/ablations/latent_cpu ...

Any variant can be had by itself: `create_model("Diffit", conditioning="separate")`, or for train.py
`--network '{conditioning: separate}'`.

## What the variants cost

Multiply-adds are those of one evaluation of one image. The last column names the layers of a block that read the time
token, and how many numbers they make of its 512, in the first stages of encoder and decoder of CIFAR-10's network (128
and 256 channels).
"""
MEASURED = """
Networks were trained on Fashion-MNIST. The Frechet distance (lower is better) is that of unguided samples to the
training set, in the features of the classifier of Fashion-MNIST; accuracy is the share of samples that it sees as
the class asked for; the held-out loss is the training loss on 2,000 images of the test set. Numbers are the mean over
seeds, ± its standard error. With the same seed all variants see the same images, noise and times in the same order, so
that differences are taken seed by seed. A difference exceeds the noise if zero lies outside the 95% interval of its
mean (Student's t). FID and the numbers measured here are not on one scale: compare directions.
"""

# Figures by tools of their own, shown where somebody has made them: title, file, command, what is seen.
FIGURES = (
    (
        "Attention over the sampling trajectory: Fig. 2",
        "attention_maps.png",
        "python tools/attention_maps.py --num_samples 2 --class_labels 7 3 --out docs/assets/attention_maps.png",
        "In the paper the central token's attention goes from diffuse to localised on the object with TMSA, and does\n"
        "not without time in attention. Here: the bundled model, mean over heads and blocks. `--model_path` takes any\n"
        "checkpoint, of a variant without time in attention too.",
    ),
    (
        "Guidance scale: Fig. 7a",
        "guidance_sweep.png",
        "python tools/guidance_sweep.py --num_samples 10000 --plot docs/assets/guidance_sweep.png",
        "In the paper FID is lowest at 4.6 (ImageNet-256, power-cosine) and 1.49 (512, constant).",
    ),
)


@dataclass(frozen=True)
class Runs:
    """What was measured with one base.

    Args:
        name: of its folder.
        config: of one of its runs, as config.yaml has it.
        scores: variant -> seed -> step -> scores.
        settings: variant -> fields of its network's config.
    """

    name: str
    config: dict[str, Any]
    scores: dict[str, dict[int, dict[int, dict[str, float]]]]
    settings: dict[str, dict[str, Any]]

    @property
    def space(self) -> str:
        network = model_config(self.config["model"], **self.config["network"])
        return "latent" if isinstance(network, DiffiTConfig) else "image"

    def values(self, variant: str, key: str, step: int | None = None) -> dict[int, float]:
        """A score by seed, at a step or at the end of the run; of the seeds that are finished."""
        last = self.config["steps"] if step is None else step
        found = self.scores.get(variant, {})
        return {seed: steps[last][key] for seed, steps in sorted(found.items()) if last in steps}

    def steps(self, variant: str) -> list[int]:
        """The steps that were scored with any seed."""
        return sorted({step for steps in self.scores.get(variant, {}).values() for step in steps})


def read_runs(out: Path) -> Runs:
    """All scores of a folder of `run`.

    Raises:
        ValueError: if there are none.
    """
    scores: dict[str, dict[int, dict[int, dict[str, float]]]] = {}
    settings, config = {}, None
    for path in sorted(out.glob("*/*/scores.json")):
        variant, seed = path.parent.parent.name, int(path.parent.name)
        config = yaml.safe_load((path.parent / "config.yaml").read_text())
        settings[variant] = config["network"]
        measured = json.loads(path.read_text())
        scores.setdefault(variant, {})[seed] = {int(step): values for step, values in measured.items()}
    if config is None:
        raise ValueError(f"{out} holds no scores: start with tools/ablations.py run")
    return Runs(out.name, config, scores, settings)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of a single value is not a number."""
    array = np.array(values)
    return float(array.mean()), float(array.std(ddof=1) / len(array) ** 0.5) if len(array) > 1 else float("nan")


def verdict(differences: list[float]) -> str:
    """Whether the mean of differences over seeds exceeds the noise: worse, better, or within the noise."""
    mean, error = mean_and_error(differences)
    if len(differences) < 2:
        return "one seed says nothing"
    if abs(mean) <= stats.t.ppf(0.975, len(differences) - 1) * error:
        return "within the noise"
    return "worse" if mean > 0 else "better"


def _number(values: list[float], digits: int, sign: str = "") -> str:
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.{digits}f}" + ("" if np.isnan(error) else f" ± {error:.{digits}f}")


def study_table(study: Any, runs: Runs | None) -> list[str]:
    """Published FID of a study's variants and, beside them, what was measured; unmeasured variants have no numbers."""
    sets = [name for name in ("CIFAR-10", "FFHQ-64") if any(name in v.paper for v in study.variants)]
    head = ["variant", *(f"paper: FID, {name}" for name in sets)]
    if runs is not None:
        head += ["Frechet distance", "difference to the first", "accuracy", "held-out loss", "difference"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for variant in study.variants:
        row = [variant.label, *(f"{variant.paper[name]:.2f}" if name in variant.paper else "-" for name in sets)]
        if runs is not None:
            row += _measured(variant.name, study.variants[0].name, runs)
        lines.append(f"| {' | '.join(row)} |")
    return lines


def _measured(name: str, reference: str, runs: Runs) -> list[str]:
    if not runs.values(name, "frechet"):
        return ["not run", "", "", "", ""]

    def cells(key: str, digits: int) -> list[str]:
        found, base = runs.values(name, key), runs.values(reference, key)
        shared = [found[seed] - base[seed] for seed in found if seed in base]
        compared = f"{_number(shared, digits, '+')} ({verdict(shared)})" if name != reference and shared else ""
        return [_number(list(found.values()), digits), compared]

    return [*cells("frechet", 3), cells("accuracy", 3)[0], *cells("held_out_loss", 4)]


def describe(runs: Runs) -> str:
    """What the runs of a folder have in common, in a sentence."""
    config = runs.config
    seeds = sorted({seed for found in runs.scores.values() for seed in found})
    cost = estimate(model_config(config["model"], **(runs.settings.get("tmsa", config["network"]))))
    return (
        f"**{runs.name}**: `{config['model']}` of {cost.parameters:,} parameters and {cost.flops / 6e6:,.1f} M "
        f"multiply-adds, {config['steps']:,} steps of {config['batch_size']} images each, "
        f"{config['evaluation']['samples']:,} samples by {config['sampling']['sampler']} in "
        f"{config['sampling']['num_sampling_steps']} steps, seeds {', '.join(map(str, seeds))}."
    )


def plot_study(study: Any, runs: Runs, path: Path) -> bool:
    """The picture of a study, like the paper's; returns False if there is nothing to plot yet."""
    figure, grid = new_figure(1, 1, 6, 4)
    axes = grid[0, 0]
    if study.plot == "steps":
        for variant in (v for v in study.variants if v.curve and runs.steps(v.name)):
            steps = runs.steps(variant.name)
            _curve(axes, steps, [list(runs.values(variant.name, "frechet", s).values()) for s in steps], variant.label)
        axes.set_xlabel("training steps")
        drawn = sum(len(line.get_xdata()) > 1 for line in axes.lines)
        axes.legend()
    else:
        points = []
        for variant in (v for v in study.variants if runs.values(v.name, "frechet")):
            network = model_config(runs.config["model"], **runs.settings[variant.name])
            points.append((getattr(network, study.plot), list(runs.values(variant.name, "frechet").values())))
        points.sort()
        drawn = len(points) > 1
        if drawn:
            _curve(axes, [x for x, _ in points], [values for _, values in points], None)
            axes.set_xticks([x for x, _ in points])
        axes.set_xlabel(study.plot.replace("_", " "))
    axes.set_ylabel("Frechet distance (lower is better)")
    axes.set_title(f"{study.title.split(': ')[0]}, {runs.name}: mean and standard error over seeds", fontsize=10)
    axes.grid(alpha=0.3)
    if drawn:
        save_figure(figure, path)
    return bool(drawn)


def _curve(axes: Any, x: list[float], values: list[list[float]], label: str | None) -> None:
    pairs: NDArray[np.float64] = np.array([mean_and_error(each) for each in values])
    axes.errorbar(x, pairs[:, 0], np.nan_to_num(pairs[:, 1]), marker="o", markersize=4, capsize=3, label=label)


def time_layers(model: torch.nn.Module, cond_dim: int) -> str:
    """The layers of the first blocks that read the conditioning token: name, and how many numbers they make of it."""
    found: dict[str, int] = {}
    for part in ("encoder", "decoder"):
        block = model.get_submodule(f"{part}.0.0")
        for name, layer in block.named_modules():
            if isinstance(layer, torch.nn.Linear) and layer.in_features == cond_dim:
                found.setdefault(f"`{name.removeprefix('block.')}`", layer.out_features)
    return ", ".join(f"{name} {outputs}" for name, outputs in found.items())


def cost_table(studies: list[Any]) -> list[str]:
    """Parameters and multiply-adds of every variant in published networks."""
    odd = 509  # a width that no other layer has
    head = ["variant", *(f"{name}: parameters | multiply-adds" for name in NETWORKS), "reads the token by"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * (2 * len(NETWORKS) + 2)]
    rows = {v.name: (v, study) for study in reversed(studies) for v in study.variants}
    order = [name for study in studies for name in (v.name for v in study.variants)]
    for name in dict.fromkeys(["tmsa", *order]):
        variant, study = rows[name]
        label = "TMSA, the model of the paper" if name == "tmsa" else variant.label
        if study.plot == "window_size" and name != "tmsa":
            label = f"window, {variant.label}"
        cells = [label]
        for model in NETWORKS:
            if study.space == "image" and model == "Diffit" and name != "tmsa":
                cells += ["-", "-"]
                continue
            cost = estimate(model_config(model, **variant.settings(model, {})))
            cells += [f"{cost.parameters:,}", f"{cost.flops / 6e9:.4g} G"]
        with torch.device("meta"):
            fields = variant.settings("ImageDiffit-CIFAR10", {}) | {"cond_dim": odd}
            cells.append(time_layers(build_model(model_config("ImageDiffit-CIFAR10", **fields)), odd))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def write_report(doc: Path, outs: list[Path], studies: list[Any]) -> None:
    """Write the page, and the plots beside it in assets/.

    Raises:
        ValueError: if a folder holds no scores.
    """
    measured = [read_runs(out) for out in outs]
    lines = [
        INTRO,
        "## What the variants cost",
        "",
        "The last column is of the first stages of CIFAR-10's network.",
        "",
    ]
    lines = [INTRO, *cost_table(studies), "", "## What they do"]
    lines += [MEASURED, *(f"{describe(runs)}\n" for runs in measured)] if measured else ["", "Nothing was run yet.", ""]
    for study in studies:
        lines += ["", f"### {study.title}", "", *([study.note, ""] if study.note else [])]
        fitting = [runs for runs in measured if study.space in (runs.space, "both")]
        names = [variant.name for variant in study.variants]
        shown = [runs for runs in fitting if sum(bool(runs.values(name, "frechet")) for name in names) > 1]
        if not shown and any(variant.paper for variant in study.variants):
            lines += study_table(study, None)
        for runs in shown:
            lines += [f"{runs.name}:", "", *study_table(study, runs), ""]
            picture = doc.parent / "assets" / f"ablations_{runs.name}_{study.plot}.png"
            if study.plot and plot_study(study, runs, picture):
                lines += [f"![{study.title}, {runs.name}](assets/{picture.name})", ""]
    for title, name, command, seen in FIGURES:
        picture = [f"![{title}](assets/{name})", ""] if (doc.parent / "assets" / name).exists() else []
        lines += ["", f"### {title}", "", seen, "", f"    {command}", "", *picture]
    text = "\n".join(lines).rstrip() + "\n"
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    write_atomically(doc, text.encode())
    print(doc)
