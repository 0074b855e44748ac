"""The report of tools/ablations.py: tables beside the paper's, what exceeds the noise, plots, and costs of variants.

Its prose stands in docs/ablations.md; what is written here goes between the comments of that page.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from plots import new_figure, save_figure
from scipy import stats
from studies import Study

from diffit.models.config import NetworkConfig, model_config
from diffit.system.files import write_atomically
from diffit.training.estimate import estimate

# Published networks, in which costs are counted.
NETWORKS = ("Diffit", "ImageDiffit-CIFAR10", "ImageDiffit-FFHQ64")
Scores = dict[str, float]


@dataclass(frozen=True)
class Runs:
    """What was measured with one base.

    Args:
        name: of its folder.
        config: of one of its runs, as config.yaml has it.
        samples: how many were scored.
        scores: variant -> seed -> step -> scores.
        networks: by variant.
    """

    name: str
    config: dict[str, Any]
    samples: int
    scores: dict[str, dict[int, dict[int, Scores]]]
    networks: dict[str, NetworkConfig]

    def values(self, variant: str, key: str, step: int | None = None) -> dict[int, float]:
        """A score by seed, at a step or at the end of the run; of the seeds that have come so far."""
        step = self.config["steps"] if step is None else step
        found = self.scores.get(variant, {})
        return {seed: steps[step][key] for seed, steps in sorted(found.items()) if step in steps}


def read_runs(out: Path) -> Runs:
    """All scores of a folder of `run`.

    Raises:
        ValueError: if there are none, or of different numbers of samples.
    """
    scores: dict[str, dict[int, dict[int, Scores]]] = {}
    networks, config, counts = {}, {}, set()
    for path in sorted(out.glob("*/*/scores.json")):
        variant, seed = path.parent.parent.name, int(path.parent.name)
        config = yaml.safe_load((path.parent / "config.yaml").read_text())
        networks[variant] = model_config(config["model"], **config["network"])
        measured = {int(step): values for step, values in json.loads(path.read_text()).items()}
        scores.setdefault(variant, {})[seed] = measured
        counts |= {values["samples"] for values in measured.values()}
    if not counts:
        raise ValueError(f"{out} holds no scores: start with tools/ablations.py run")
    if len(counts) > 1:
        raise ValueError(f"{out} holds scores of {sorted(counts)} samples: run all with one --evaluation.samples")
    return Runs(out.name, config, counts.pop(), scores, networks)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of a single value is not a number."""
    return float(np.mean(values)), float(stats.sem(values)) if len(values) > 1 else float("nan")


def verdict(differences: Sequence[float]) -> str:
    """Whether the mean of differences over seeds exceeds the noise: worse, better, or within the noise."""
    mean, error = mean_and_error(differences)
    if len(differences) < 2:
        return "one seed says nothing"
    if abs(mean) <= stats.t.ppf(0.975, len(differences) - 1) * error:
        return "within the noise"
    return "worse" if mean > 0 else "better"


def _number(values: Sequence[float], digits: int, sign: str = "") -> str:
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.{digits}f}" + ("" if np.isnan(error) else f" ± {error:.{digits}f}")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def study_table(study: Study, runs: Runs | None) -> str:
    """Published FID of a study's variants and, beside it, what was measured."""
    sets = [name for name in ("CIFAR-10", "FFHQ-64") if any(name in variant.paper for variant in study.variants)]
    head = ["variant", *(f"paper: FID, {name}" for name in sets)]
    rows = [[v.label, *(f"{v.paper[name]:.2f}" if name in v.paper else "-" for name in sets)] for v in study.variants]
    if runs is not None:
        head += ["Frechet distance", "difference to the first", "accuracy", "held-out loss", "difference"]
        first = study.variants[0].name
        rows = [row + _measured(v.name, first, runs) for v, row in zip(study.variants, rows, strict=True)]
    return _table(head, rows)


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
    config, sampling = runs.config, runs.config["sampling"]
    seeds = sorted({seed for name in runs.scores for seed in runs.values(name, "frechet")})
    cost = estimate(runs.networks.get("tmsa", next(iter(runs.networks.values()))))
    return (
        f"**{runs.name}**: `{config['model']}` of {cost.parameters:,} parameters and {cost.flops / 6e6:,.1f} M "
        f"multiply-adds, {config['steps']:,} steps of {config['batch_size']} images each, {runs.samples:,} samples by "
        f"{sampling['sampler']} in {sampling['num_sampling_steps']} steps, seeds {', '.join(map(str, seeds))}."
    )


def plot_study(study: Study, runs: Runs, path: Path) -> bool:
    """The picture of a study, like the paper's; returns False if there is nothing to plot yet.

    Lines run over training steps, one a variant with a curve, or over a field of the network, through all variants.
    """
    lines: dict[str, dict[int, list[float]]] = {}  # label -> x -> scores of all seeds
    for variant in study.variants:
        by_seed = runs.scores.get(variant.name, {})
        if study.plot != "steps" and runs.values(variant.name, "frechet"):
            x = getattr(runs.networks[variant.name], study.plot)
            lines.setdefault("", {})[x] = list(runs.values(variant.name, "frechet").values())
        elif study.plot == "steps" and variant.curve and by_seed:
            steps = {step for scores in by_seed.values() for step in scores}
            lines[variant.label] = {step: list(runs.values(variant.name, "frechet", step).values()) for step in steps}
    if not any(len(line) > 1 for line in lines.values()):
        return False
    figure, grid = new_figure(1, 1, 6, 4)
    axes = grid[0, 0]
    for label, line in lines.items():
        x = sorted(line)
        means, errors = zip(*(mean_and_error(line[each]) for each in x), strict=True)
        axes.errorbar(x, means, np.nan_to_num(errors), marker="o", markersize=4, capsize=3, label=label)
    if study.plot == "steps":
        axes.legend()
    else:
        axes.set_xticks(x)
    axes.set_xlabel("training steps" if study.plot == "steps" else study.plot.replace("_", " "))
    axes.set_ylabel("Frechet distance (lower is better)")
    axes.set_title(f"{study.title.split(': ')[0]}, {runs.name}: mean and standard error over seeds", fontsize=10)
    axes.grid(alpha=0.3)
    save_figure(figure, path)
    return True


def cost_table(studies: Sequence[Study]) -> str:
    """Parameters and multiply-adds of every variant in published networks, the paper's model first."""
    first = studies[0].variants[0]
    rows = [("the paper's model", first, studies[0])]
    rows += [(variant.label, variant, study) for study in studies for variant in study.variants[1:]]
    table = []
    for label, variant, study in rows:
        cells = [label]
        for model in NETWORKS:
            if variant is first or study.fits(model):
                cost = estimate(model_config(model, **variant.settings(model, {})))
                cells += [f"{cost.parameters:,}", f"{cost.flops / 6e9:.4g} G"]
            else:
                cells += ["-", "-"]
        table.append(cells)
    head = [words for name in NETWORKS for words in (f"{name}: parameters", "multiply-adds")]
    return _table(["variant", *head], table)


def study_section(study: Study, measured: Sequence[Runs], assets: Path) -> list[str]:
    """Paragraphs of a study: its tables, and its plots, which are written to `assets`."""
    blocks = [f"### {study.title}", *([study.note] if study.note else [])]
    shown = [runs for runs in measured if sum(bool(runs.values(v.name, "frechet")) for v in study.variants) > 1]
    if not shown and any(variant.paper for variant in study.variants):
        blocks.append(study_table(study, None))
    for runs in shown:
        blocks += [f"{runs.name}:", study_table(study, runs)]
        picture = f"ablations_{runs.name}_{study.plot}.png"
        if study.plot and plot_study(study, runs, assets / picture):
            blocks.append(f"![{study.title}, {runs.name}]({assets.name}/{picture})")
    return blocks


def write_report(doc: Path, outs: Sequence[Path], studies: Sequence[Study]) -> None:
    """Write the tables into a page, which is made if it does not exist, and the plots beside it in assets/.

    Raises:
        ValueError: if the page lacks the comments that hold their places, and see `read_runs`.
    """
    places = {
        name: (f"<!-- {name}, written by tools/ablations.py report -->", f"<!-- end of {name} -->")
        for name in ("costs", "results")
    }
    empty = "\n\n".join(["# Ablations", *(line for place in places.values() for line in place)]) + "\n"
    measured, text = [read_runs(out) for out in outs], doc.read_text() if doc.exists() else empty
    results = [describe(runs) for runs in measured] or ["Nothing was run yet."]
    for study in studies:
        results += study_section(study, measured, doc.parent / "assets")
    for (name, (begin, end)), blocks in zip(places.items(), ([cost_table(studies)], results), strict=True):
        if begin not in text or end not in text:
            raise ValueError(f"{doc} has no place for {name}: it needs the lines {begin} and {end}")
        before, after = text.split(begin)[0], text.split(end)[1]
        text = "\n\n".join([before + begin, *blocks, end + after])
    write_atomically(doc, text.encode())
    print(doc)
