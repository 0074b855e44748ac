"""The command train.py. Precedence of settings, weak to strong: defaults, --config, flags."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from diffit.checkpoint.config import CheckpointConfig, default_config
from diffit.checkpoint.resolve import find_checkpoint
from diffit.cli.parser import build, given_arguments, parse, split_flags
from diffit.cli.run import one_sentence
from diffit.cli.settings import Command, yaml_lines
from diffit.config import PIXELS
from diffit.diffusion.config import (
    check_process,
    fitting_processes,
)
from diffit.models.config import DiffiTConfig, model_config
from diffit.settings import SAME, settings_that
from diffit.system.console import say, warn
from diffit.system.ranks import detect_world
from diffit.training.config import TrainConfig, TrainTask, find_start

COMMAND = Command(
    TrainConfig,
    prog="train.py",
    description="Train a DiffiT: python train.py --config configs/fashion_mnist.yaml",
    epilog="Alone, or on many GPUs: torchrun --nproc_per_node=8 train.py --config ...",
    everyday=(
        *("data.path", "data.name", "model", "run_dir", "steps", "batch_size", "optimizer.lr", "init_from"),
        *("save_every", "preview_every", "precision", "compile", "device", "dry_run"),
    ),
    follows={
        "process": "that of the model's kind",
        "codec": "that of the model's kind",
        "sampling.sampler": "that of the process",
        "sampling.num_sampling_steps": "that of the process",
    },
)


@one_sentence("stopped: the same command goes on from the newest checkpoint")
def main() -> int:
    """Parse, train, print where the weights are; returns 75 if a signal stopped the run."""
    task, world = parse_train(), detect_world()
    if task.config.dry_run:
        _dry_run(task.config, world.size)
        return 0
    check_data(task.config)
    from diffit.training.loop import train
    from diffit.training.stopping import Stopped

    try:
        path = train(task)
    except Stopped as stopped:
        if world.is_main:
            warn(stopped)
        return stopped.exit_code
    if world.is_main:
        say(f"{path}  (python sample.py --model_path {shlex.quote(str(path))})")
    return 0


def _dry_run(config: TrainConfig, ranks: int) -> None:
    """Print the settings that apply, and as comments what the images are and what the run costs."""
    from diffit.codec import vae_config
    from diffit.data.datasets import ImageDataset
    from diffit.data.files import find_pictures
    from diffit.system.device import resolve_device
    from diffit.training.defaults import describe
    from diffit.training.estimate import report

    network, lines = model_config(config.model, **config.network), list[str]()
    class_names = ("",) * (10 if config.data.name != "folder" else network.num_classes)  # images may be elsewhere
    if config.data.name == "folder" and config.data.path and Path(config.data.path).expanduser().exists():
        pixels = config.codec.vae == PIXELS
        channels = network.in_channels if pixels else vae_config(config.codec.vae)["out_channels"]
        images = ImageDataset(find_pictures(config.data.path), network.input_size * config.codec.factor, channels)
        class_names = images.class_names
        lines = [str(images.source), *images.remarks(), *describe(config, class_names, len(images))]
    lines += report(config, class_names, ranks, resolve_device(config.device)).splitlines()
    num_classes = config.checkpoint_config(class_names, "").network.num_classes
    say(*yaml_lines(config, num_classes), *(f"# {line}" for line in lines))


@one_sentence()
def parse_train(argv: Sequence[str] | None = None, device: str | None = None) -> TrainTask:
    """Resolve train.py's command line. Ends the program with one sentence and exit code 2 if it cannot be.

    device: the kind of device to choose settings for; by default that of --device.
    """
    arguments = given_arguments(COMMAND, argv)
    given = parse(COMMAND, arguments)
    if not {"model", "init_from"} & given.keys() and all(flag != "--config" for flag, _, _ in split_flags(arguments)):
        given = _completed(given, arguments, device)
    known, own = _followed(given)
    follows = {"model": known.model, "codec.vae": known.codec.vae, "codec.factor": known.codec.factor}
    follows |= known.recommended(given.get("sampling.sampler")) if given.get("init_from") else {}
    follows |= {f"sampling.{key}": getattr(known.sampling, key) for key in ("sampler", "num_sampling_steps")}
    follows |= {"process": known.process}
    config = build(TrainConfig, follows | given | {"network": own | given.get("network", {})})
    _check(config)
    recipes = [values[0] for flag, values, _ in split_flags(arguments) if flag == "--config"]
    return TrainTask(config, (recipes or ["command line"])[0])


def _completed(given: dict[str, Any], arguments: Sequence[str], device: str | None) -> dict[str, Any]:
    """The settings where no model and no recipe is named: those of the run so far, or what fits images and machine."""
    path = given.get("data.path")
    root = Path(path).expanduser().resolve() if path else None
    run_dir = given.get("run_dir", f"runs/{root.stem or 'train'}" if root else TrainConfig.run_dir)
    recorded = Path(run_dir) / "config.yaml"
    if recorded.is_file():
        before = parse(COMMAND, ["--config", str(recorded)])
        if "run_dir" not in given and root and root != Path(before.get("data.path") or "").expanduser().resolve():
            raise ValueError(
                f"{run_dir} holds a run of other images, {before.get('data.path')}: name another --run_dir"
            )
        return parse(COMMAND, ["--config", str(recorded), *arguments]) | {"run_dir": run_dir}
    if root is None or not root.exists() or given.get("data.name", "folder") != "folder" or "data.cache" in given:
        return given
    from diffit.data.files import find_pictures
    from diffit.system.device import resolve_device
    from diffit.training.defaults import choose_settings

    kind = device or resolve_device(given.get("device", "auto")).type
    return choose_settings(find_pictures(root), given, kind) | {"run_dir": run_dir}


def _followed(given: Mapping[str, Any]) -> tuple[CheckpointConfig, dict[str, Any]]:
    """The config whose settings are the defaults: of --init_from, else of the model's name; and its own `network`."""
    model, network, process = given.get("model", TrainConfig.model), given.get("network", {}), given.get("process")
    if given.get("init_from") is None:
        return default_config(model, process=process, **network), {}
    _, start = find_checkpoint(given.get("model"), given["init_from"], door="--init_from")
    size = asdict(model_config(start.model))
    # Of classes there are as many as in the data, or none as before; the process decides on a variance.
    own = {key: value for key, value in asdict(start.network).items() if value != size[key] and key != "learn_sigma"}
    if own.get("num_classes"):
        del own["num_classes"]
    if process not in (None, start.process):  # what is recommended for the one means nothing to the other
        return replace(default_config(start.model, process=process, **own), codec=start.codec), own
    return start, own


def check_data(config: TrainConfig) -> None:
    """Refuse a run that has nothing to learn from, before anything is loaded.

    Raises:
        ValueError: if no images are named, and no folder of latents is there in their place.
        FileNotFoundError: if they are not where they are said to be.
    """
    data = config.data
    cache = Path(data.cache).expanduser() if data.cache else Path(config.run_dir) / "cache"
    if data.name != "folder" or (config.codec.vae != PIXELS and cache.is_dir()):
        return  # installed or downloaded, if they have no path; or not needed, if the cache is whole
    if data.path is None:
        raise ValueError(
            "name the images: --data.path FOLDER_OR_ZIP; or take a recipe that brings its own, such as --config "
            "configs/debug.yaml (seconds on a CPU), configs/fashion_mnist.yaml or configs/cifar10.yaml"
        )
    root = Path(data.path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"there are no images at {root}: check --data.path")


def _check(config: TrainConfig) -> None:
    latent, pixels = isinstance(model_config(config.model, **config.network), DiffiTConfig), config.codec.vae == PIXELS
    space = "latents" if latent else "pixels"
    fitting, rates, powers, scored = fitting_processes(space), config.ema_rates, config.ema_powers, config.evaluation
    if config.process not in fitting or latent == pixels:
        raise ValueError(f"{config.model} needs --process {' or '.join(fitting)} and a --codec.vae of {space}")
    check_process(config.process_config, config.sampling, config.guidance)
    if config.data.augment and latent:
        raise ValueError(f"--data.augment is for pixels alone, and {config.model} sees latents: leave it out")
    if config.keep_every and (config.save_every is None or config.keep_every % config.save_every):
        raise ValueError(
            f"--keep_every {config.keep_every} needs a --save_every of which it is a multiple, not "
            f"{config.save_every}: other steps have no checkpoint"
        )
    if not rates or len({*rates}) < len(rates) or len({*powers}) < len(powers):
        raise ValueError(f"the EMAs {[*rates, *powers]} must be at least one, and all different")
    if scored.every and scored.reference is None:
        raise ValueError("--evaluation.every needs --evaluation.reference: make one with evaluations/make_reference.py")
    if config.validation.every and config.validation.path is None and config.data.name == "folder":
        raise ValueError("--validation.every needs --validation.path: held-out images, laid out as the training images")
    if scored.every and config.parallel == "fsdp":
        raise ValueError(
            "--evaluation does not score sharded networks: score checkpoints with sample.py and eval_run.sh"
        )
    if config.init_from is not None:
        _check_start(config)


def _check_start(config: TrainConfig) -> None:
    """Refuse an --init_from that does not exist or holds another network."""
    source, start = find_start(config)
    network = config.checkpoint_config((), "").network
    must_agree = settings_that(SAME, type(network))  # `adapt_state` fits the weights to the others
    for key, value in asdict(network).items():
        other = getattr(start.network, key)
        if key in must_agree and value != other:
            flag = "process" if key == "learn_sigma" else f"network.{key}"
            raise ValueError(
                f"--init_from {source} holds another network, of {key} {other} instead of {value}: only the number of "
                f"classes and the resolution may differ; leave --{flag} out, or start from other weights"
            )


if __name__ == "__main__":  # torchrun -m diffit.cli.train
    sys.exit(main())
