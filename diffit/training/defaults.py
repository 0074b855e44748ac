"""What train.py does where only the images were named, chosen from them and the machine; and what it says of a run.

It is chosen once. The first start writes it to RUN_DIR/config.yaml, from where the same command takes it again, on any
machine. The settings for a laptop were found by trying (docs/own_images.md); those for a GPU have not been tried.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch

from diffit.codec import vae_config, vae_is_at_hand
from diffit.config import PIXELS, STABILITY_VAE
from diffit.data.files import ImageFiles
from diffit.models.config import build_model
from diffit.system.console import warn
from diffit.system.ranks import detect_world
from diffit.training.config import TrainConfig

_STABILITY = STABILITY_VAE.format("ema")
_LAPTOP = {"steps": 12_000, "batch_size": 16, "ema_decay": 0.998, "precision": "fp32", "optimizer.lr": 2e-3}
_GPU = {"steps": 20_000, "batch_size": 128, "ema_decay": 0.9995, "precision": "bf16", "optimizer.lr": 3e-4}
_BOTH = {
    **{"optimizer.schedule": "cosine", "optimizer.grad_clip": 1.0, "optimizer.warmup": 100},
    **{"process": "flow", "flow.time_distribution": "logit_normal"},
    **{"sampling.sampler": "heun", "sampling.num_sampling_steps": 20},
}
_GUIDED = {"guidance.schedule": "constant", "guidance.channels": "all"}


def choose_settings(pictures: ImageFiles, given: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The settings of a new run by dotted name, the given ones among them.

    Args:
        pictures: the images to learn from.
        given: the settings that were given, by dotted name.
        device: kind of the device: cpu, cuda or mps; what is not CUDA counts as a laptop.
    """
    on_gpu, vae, network = device == "cuda", given.get("codec.vae", PIXELS), given.get("network", {})
    side = median([min(width, height) for width, height, _ in pictures.headers()] or [32])
    if "codec.vae" not in given and on_gpu and side >= 128:
        if vae_is_at_hand(_STABILITY):
            vae = _STABILITY
        elif detect_world().is_main:
            warn(f"{_STABILITY} is neither here nor can it be downloaded: pixels of 64x64 are learned")
    chosen = _BOTH | (_GPU if on_gpu else _LAPTOP)
    if vae == PIXELS:
        for_gpu = "ImageDiffit-CIFAR10" if side <= 40 else "ImageDiffit-FFHQ64"
        chosen |= {"model": for_gpu if on_gpu else "ImageDiffit-Small"}
        network = {"in_channels": pictures.channels()} | network
    else:
        known = vae_config(vae)
        factor = 2 ** (len(known["block_out_channels"]) - 1)
        chosen |= {"model": "Diffit-S", "codec.vae": vae, "codec.factor": factor}
        small = {} if on_gpu else {"hidden_size": 128, "depth": 6, "num_heads": 4}
        sizes = {"in_channels": known["latent_channels"], "input_size": known["sample_size"] // factor}
        network = small | sizes | network
    if given.get("process", "flow") != "flow":  # whose sampler and settings are others
        chosen = {key: value for key, value in chosen.items() if key.partition(".")[0] not in ("flow", "sampling")}
    classes = network.get("num_classes", len(pictures.class_names))
    guidance = _GUIDED | {"guidance.scale": 2.0 if on_gpu else 3.0} if classes else {}
    return chosen | guidance | dict(given) | {"network": network}


def describe(config: TrainConfig, class_names: Sequence[str], count: int) -> list[str]:
    """What will be learned, and what comes after it, in lines.

    Args:
        config: of the run.
        class_names: of the images; empty without classes.
        count: number of images.
    """
    network = config.checkpoint_config(tuple(class_names), "").network
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(network).parameters())
    lines, classes = [], network.num_classes
    if class_names and not classes:
        lines.append(f"the {len(class_names)} classes of the images are not used: --network.num_classes is 0")
    elif classes > len(class_names):
        lines.append(f"the network has {classes} classes, the images have {len(class_names)}")
    side, where = network.input_size * config.codec.factor, shlex.quote(config.run_dir)
    space = "pixels" if config.codec.vae == PIXELS else f"latents of {config.codec.vae}"
    guided = f", {classes} classes" if classes else ", without classes"
    lines += [
        f"network: {config.model}, {parameters / 1e6:.3g} M parameters, images of {side}x{side}{guided}; process: "
        f"{config.process} on {space}",
        f"{config.steps:,} steps of {config.batch_size} images: each of the {count:,} images is seen "
        f"{config.steps * config.batch_size / count:,.1f} times",
        f"settings: {where}/config.yaml, from where the same command goes on; previews: {where}/previews/latest.png",
    ]
    wish = f" --class_labels {shlex.quote(class_names[0])}" if class_names and classes else ""
    return [*lines, f"then: python sample.py --model_path {where}{wish}"]
