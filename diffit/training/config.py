"""The settings of training. No tensor library is needed to read them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Literal

from diffit.checkpoint.config import CheckpointConfig
from diffit.checkpoint.resolve import Source, find_checkpoint
from diffit.config import CodecConfig, Device, Precision
from diffit.data.config import DataConfig
from diffit.diffusion.config import ProcessSettings
from diffit.models.config import DiffiTConfig, model_config


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW.

    Args:
        lr: peak learning rate.
        betas: decay of the moments.
        weight_decay: decoupled weight decay.
        warmup: steps over which the rate rises from zero.
        schedule: constant, or a cosine from lr to zero over the run.
        grad_clip: largest gradient norm; 0 does not clip.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    grad_clip: float = 0.0


@dataclass(frozen=True)
class EvaluationConfig:
    """FID and Inception Score of the first EMA, logged beside the loss.

    Args:
        every: steps between scores; 0 is none.
        samples: how many are drawn, with the recommended settings. FID falls with their number: compare equal ones.
        batch_size: samples at a time per rank.
        reference: an .npz that evaluations/make_reference.py or ADM made.
        features: module:path of a classifier, in place of the Inception network.
    """

    every: int = 0
    samples: int = 5000
    batch_size: int = 64
    reference: str | None = None
    features: str | None = None


@dataclass(frozen=True)
class TrainConfig(ProcessSettings):
    """What train.py does.

    Args:
        model: a size of the zoo.
        network: fields of the network's config to replace, such as {depth: 30} or {blocks: [4, 4, 4]}.
        run_dir: folder of checkpoints and logs; the same command again resumes from its newest checkpoint.
        init_from: start a new run from other weights: a checkpoint file, a bundled name (Diffit-Fashion), Diffit for
            the released ones, or a Hub file owner/repository/name.safetensors; their classes and resolution may differ.
        steps: optimizer steps of the whole run.
        batch_size: images of a step, over all ranks and all parts of an accumulated step.
        accumulate: parts in which each rank computes its share of a step, one after the other, to save memory.
        seed: of initialisation, order of images, timesteps, noise and dropped labels.
        ema_decay: of the EMA of the weights, which is sampled from; a list keeps several, and the first of them is the
            one to sample from.
        ema_half_life: the same in images, in place of ema_decay: after so many, an old weight counts half. As in EDM it
            is at most 5% of the images seen so far.
        device: where to run; auto takes a GPU if there is one.
        precision: of the network in the forward and backward pass; weights stay in fp32. The loss of fp16 is scaled.
        compile: compile the network with torch.compile.
        parallel: what several ranks share out: ddp the batch alone, fsdp (FSDP2) also weights, gradients, optimizer
            and EMAs, for networks that outgrow a GPU.
        activation_checkpointing: compute every block again in the backward pass, to save memory.
        rank_timeout: minutes that ranks wait for one that hangs in a step, before the run ends with an error.
        max_skipped: so many steps in a row whose loss or gradient is not finite end the run; fewer are skipped.
        log_every: steps between log lines.
        save_every: steps between checkpoints.
        keep: how many of the newest checkpoints stay.
        keep_every: checkpoints of steps that are a multiple of it stay for good; 0 is none.
        tracker: where curves and pictures go beside log.jsonl; tensorboard only where it is installed.
        preview_every: steps between pictures of samples, always from the same noise; 0 is none.
        sampling: what the checkpoint recommends to sample.py.
        guidance: what the checkpoint recommends to sample.py.
        codec: the VAE, or pixels.
        process: the diffusion process: gaussian (the default of latent models), edm (that of models of pixels) or flow
            (both); its settings are in the node diffusion, edm or flow.
        dry_run: print the resolved config, the size of the network and the cost of the run, and stop.
    """

    model: str = "Diffit"
    network: dict[str, int | float | bool | str | list[int]] = field(default_factory=dict)
    run_dir: str = "runs/train"
    init_from: str | None = None
    steps: int = 400_000
    batch_size: int = 256
    accumulate: int = 1
    seed: int = 0
    ema_decay: float | list[float] = 0.9999
    ema_half_life: float | list[float] | None = None
    device: Device = "auto"
    precision: Precision = "tf32"
    compile: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    activation_checkpointing: bool = False
    rank_timeout: float = 10.0
    max_skipped: int = 25
    log_every: int = 100
    save_every: int = 5000
    keep: int = 2
    keep_every: int = 0
    tracker: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    preview_every: int = 0
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    dry_run: bool = False

    def checkpoint_config(self, class_names: tuple[str, ...], made_by: str) -> CheckpointConfig:
        """What a checkpoint of this run says about itself."""
        network = model_config(self.model, **self.network)
        if network.num_classes and "num_classes" not in self.network:  # an unconditional size stays so
            network = replace(network, num_classes=len(class_names))
        if isinstance(network, DiffiTConfig):
            network = replace(network, learn_sigma=self.process_config.learn_sigma)
        return CheckpointConfig(
            model=self.model,
            network=network,
            codec=self.codec,
            class_names=class_names if network.num_classes else (),
            made_by=made_by,
            **{node.name: getattr(self, node.name) for node in fields(ProcessSettings)},
        )

    @property
    def ema_rates(self) -> list[float]:
        """The decays of the EMAs, or their half-lives if these are set; the one to sample from first."""
        given = self.ema_decay if self.ema_half_life is None else self.ema_half_life
        return given if isinstance(given, list) else [given]


@dataclass(frozen=True)
class TrainTask:
    """A resolved command line of train.py, and the recipe that it followed."""

    config: TrainConfig
    recipe: str


def find_start(config: TrainConfig) -> tuple[Source, CheckpointConfig]:
    """The weights that --init_from names, and what they are; see `find_checkpoint`."""
    return find_checkpoint(path=config.init_from, door="--init_from")
