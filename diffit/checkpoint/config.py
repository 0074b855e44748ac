"""The config of a checkpoint, and what follows from a model's name. No tensor library is needed to read it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, get_type_hints

from diffit.config import PIXELS, CodecConfig
from diffit.diffusion.config import (
    SAMPLERS,
    GuidanceConfig,
    ProcessSettings,
    SamplingConfig,
    changed_sampling,
    fitting_processes,
)
from diffit.models.config import DiffiTConfig, NetworkConfig, model_config
from diffit.settings import check_settings

METADATA_KEY = "diffit"  # of a safetensors file's metadata, whose value is the config as JSON


@dataclass(frozen=True)
class CheckpointConfig(ProcessSettings):
    """The metadata of a checkpoint: the model, the process it was trained for, how best to sample it."""

    model: str
    network: NetworkConfig
    codec: CodecConfig = field(default_factory=CodecConfig)
    class_names: tuple[str, ...] = ()
    made_by: str = ""  # the recipe and how far it was followed

    @property
    def image_size(self) -> int:
        return self.network.input_size * self.codec.factor

    def recommended(self, sampler: str | None = None) -> dict[str, Any]:
        """The settings of process, sampling and guidance by dotted name, as defaults of a command line.

        sampler: another one than its own, for which only what it reads is recommended.
        """
        nodes = {node.name: asdict(getattr(self, node.name)) for node in fields(ProcessSettings)[1:]}
        named = {} if sampler is None else {"sampler": sampler}
        nodes["sampling"] = asdict(changed_sampling(self.process, self.sampling, **named))
        dotted = {f"{name}.{key}": value for name, node in nodes.items() for key, value in node.items()}
        return {"process": self.process} | dotted

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> CheckpointConfig:
        """The inverse of to_json. Raises TypeError, KeyError or ValueError if it is of another version."""
        tree = json.loads(text)
        for node, key in ((tree["guidance"], "interval"), (tree, "class_names")):
            node[key] = tuple(node[key]) if isinstance(node[key], list) else node[key]
        tree["network"] = model_config(tree["model"], **tree["network"])
        # Files written before a process existed lack its node and get its defaults.
        kinds = {name: kind for name, kind in get_type_hints(cls).items() if name in tree}
        nodes = {name: kind(**tree[name]) for name, kind in kinds.items() if is_dataclass(kind)}  # type: ignore[operator]
        config = cls(**{name: tree[name] for name in kinds} | nodes)
        check_settings(config, "")
        names, classes = len(config.class_names), config.network.num_classes
        if names > classes:
            raise ValueError(f"there are {names} class_names for a network of {classes} classes")
        return replace(config, sampling=changed_sampling(config.process, config.sampling))


# The published settings of the released weights: image size -> file and guidance.
RELEASED: dict[int, tuple[str, GuidanceConfig]] = {
    256: ("diffit_256.safetensors", GuidanceConfig(scale=4.4, schedule="power_cosine")),
    512: ("diffit_512.safetensors", GuidanceConfig(scale=1.49, schedule="constant")),
}


def default_config(
    model: str, image_size: int | None = None, process: str | None = None, **overrides: Any
) -> CheckpointConfig:
    """The config of weights without metadata, and what a new run begins with: all that follows from the model's name.

    Args:
        model: a name of the zoo.
        image_size: side of the images, in pixels; by default that of the size.
        process: its diffusion process; by default gaussian for latents and edm for pixels.
        overrides: fields of the network's config to replace.

    Raises:
        ValueError: if the model, or a field, is unknown.
    """
    network = model_config(model, **overrides)
    latent = isinstance(network, DiffiTConfig)
    codec = CodecConfig() if latent else CodecConfig(PIXELS, factor=1)
    if image_size is not None:
        network = replace(network, input_size=image_size // codec.factor)
    process = process or fitting_processes("latents" if latent else "pixels")[0]
    steps = ProcessSettings(process=process).process_config.default_steps(network.input_size)
    sampling = SamplingConfig(next(iter(SAMPLERS[process])), steps)
    _, guidance = RELEASED.get(network.input_size * codec.factor, ("", GuidanceConfig()))
    guidance = guidance if model == "Diffit" and process == "gaussian" else GuidanceConfig()
    return CheckpointConfig(model, network, codec, process=process, sampling=sampling, guidance=guidance)
