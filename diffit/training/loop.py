"""The training loop: batch -> loss -> gradient -> AdamW -> EMA; every n steps a log, checkpoint, preview, score."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from diffit.checkpoint.config import CheckpointConfig
from diffit.checkpoint.resolve import EMA_FILE, complete_checkpoints
from diffit.codec import Codec, VAECodec, create_codec
from diffit.data.datasets import fitting_labels
from diffit.data.loader import Batch, NoisyBatches, TrainingSet, open_training_set, training_batches
from diffit.data.sampler import BatchSampler
from diffit.diffusion import create_process
from diffit.models.config import NetworkConfig, build_model, model_config
from diffit.sampling.images import ImageSampler
from diffit.system import distributed
from diffit.system.console import say
from diffit.system.device import explained_memory, resolve_device, set_matmul_precision
from diffit.system.files import exclusive
from diffit.system.ranks import World, detect_world
from diffit.training.checkpointing import ema_files, load_run, save_run
from diffit.training.config import TrainConfig, TrainTask, find_start
from diffit.training.defaults import describe
from diffit.training.ema import EMA
from diffit.training.evaluate import Previews, create_scorer
from diffit.training.init import initial_model
from diffit.training.logging import MetricLogger
from diffit.training.parallel import apply_activation_checkpointing, is_sharded, parallelize, shard
from diffit.training.record import record_start
from diffit.training.recurring import Recurring
from diffit.training.snapshots import forget_later_snapshots, save_snapshots
from diffit.training.step import TrainState, train_step
from diffit.training.stopping import INTERRUPTED, Stopped, StopSignals
from diffit.training.tracker import check_tracker
from diffit.training.validation import create_validation

_LESS_MEMORY = (
    "lower --batch_size, or compute it in parts with --accumulate 2 or more, or recompute blocks with "
    "--activation_checkpointing true"
)


def train(task: TrainTask) -> Path:
    """Train, or go on training; returns the newest checkpoint's EMA weights, which sample.py takes.

    Raises:
        ValueError: in one sentence, for everything that a user can fix.
        Stopped: if SIGTERM, SIGUSR1 or Ctrl-C asked for it.
    """
    config, run_dir = task.config, Path(task.config.run_dir)
    checkpoints = run_dir / "checkpoints"
    device = resolve_device(config.device)
    set_matmul_precision(config.precision)
    check_shares(config, detect_world())
    try:
        with (
            explained_memory(_LESS_MEMORY),
            distributed.joined(device, minutes=config.rank_timeout) as world,
            distributed.main_only(world, exclusive(run_dir)),
        ):
            # The data, the network, the newest checkpoint if there is one
            distributed.on_main(world, lambda: check_tracker(config))
            data, description, codec = open_data(config, run_dir, world, device)
            state = create_state(config, description.network, device, world)
            load_run(state, checkpoints, description, device, world)
            recurring = create_recurring(task, state, description, codec, device, world)
            started = distributed.on_main(world, lambda: record_start(run_dir, config, state.step, world.size))
            if world.is_main:
                say(*describe(config, data.class_names, len(data.labels)))

            # Step by step; all ranks do what one of them asks for, and rank 0's clock is that of all
            with (
                closing(MetricLogger(config, description.network, state.step, device, world)) as logger,
                closing(create_batches(data, state, config, description.network, device, world)) as batches,
                StopSignals(world) as signals,
            ):
                logger.info(started)
                last = state.step == config.steps
                while not last:
                    ending = state.step + 1 == config.steps
                    clock = [world.is_main and each.by_clock(ending) for each in recurring]
                    with distributed.explained_timeout():
                        asked = train_step(state, next(batches), config, world, [signals.stop_requested, *clock])
                    logger.count_step()
                    last = asked[0] or ending
                    named = [each.by_step(state.step, last) for each in recurring]
                    if any(named) or state.step % config.log_every == 0:  # no line is made by the clock
                        logger.metrics(state)
                    for each, *due in zip(recurring, named, asked[1:], strict=True):
                        if any(due):
                            with logger.paused(), each.timed():
                                each.act(logger, last)
                if state.step < config.steps:
                    sentence = f"stopped after step {state.step}: the same command goes on from there"
                    raise Stopped(sentence, signals.exit_code)
    except KeyboardInterrupt:
        saved = complete_checkpoints(checkpoints)
        then = f"goes on from step {int(saved[-1].name)}" if saved else "starts anew, as there is no checkpoint yet"
        raise Stopped(f"stopped at once: the same command {then}", INTERRUPTED) from None
    return complete_checkpoints(checkpoints)[-1] / EMA_FILE


def create_recurring(
    task: TrainTask,
    state: TrainState,
    description: CheckpointConfig,
    codec: Codec,
    device: torch.device,
    world: World,
) -> list[Recurring]:
    """Snapshots, checkpoints, previews, scores and validation losses, in the order in which they come after a step.

    Raises:
        ValueError, FileNotFoundError: in one sentence, for what pictures or scores lack: now, not after hours.
    """
    config, run_dir, ema = task.config, Path(task.config.run_dir), state.emas[EMA_FILE].model
    after = made_after(config)  # now: the file may be gone when a checkpoint is written
    pictures = ImageSampler.create(ema, description, device, precision=config.precision, codec=codec)
    previews = Previews(pictures, run_dir / "previews")
    score = create_scorer(pictures, config, device) if config.evaluation.every else None
    validate = create_validation(pictures, config, world) if config.validation.every else None

    def named() -> CheckpointConfig:
        made_by = f"{task.recipe}, {state.step} steps of {config.batch_size} images{after}"
        return replace(description, made_by=made_by)

    def snapshot(logger: MetricLogger, last: bool) -> None:
        if state.step % config.snapshot_every == 0 or state.step == config.steps:  # not where a signal ends this start
            with logger.optional("snapshot", f"the snapshots of step {state.step} could not be written"):
                save_snapshots(state, run_dir, config, named(), world)

    def save(logger: MetricLogger, last: bool) -> None:
        logger.info(save_run(state, run_dir / "checkpoints", config, named(), world, must=last))

    def preview(logger: MetricLogger, last: bool) -> None:
        together = is_sharded(ema)  # all ranks take part in sampling from a sharded network
        images, failed = [], f"the preview of step {state.step} could not be made"
        with logger.optional("preview", failed):
            if together:
                images = distributed.on_all(world, previews.draw)
            elif world.is_main:
                images = previews.draw()
        with logger.optional("preview", failed):
            if world.is_main and images:
                path = previews.show(images, state.step)
                logger.info(f"preview of step {state.step}: {path}")
                logger.image(state.step, "samples", path)
        distributed.barrier(world)

    def evaluate(scores: Callable[[], dict[str, float]] | None, logger: MetricLogger, last: bool) -> None:
        with logger.optional("scores", f"step {state.step} could not be scored", is_sharded(ema)):
            logger.scores(state.step, scores() if scores else {})

    if config.ema_powers:
        distributed.on_main(world, partial(forget_later_snapshots, run_dir, state.step))
    return [
        *([Recurring(snapshot, config.snapshot_every, at_end=True)] if config.ema_powers else []),
        Recurring(save, config.save_every, gap=60, at_end=True),
        Recurring(preview, config.preview_every, growth=1.2),
        Recurring(partial(evaluate, score), config.evaluation.every),
        Recurring(partial(evaluate, validate), config.validation.every),
    ]


def open_data(
    config: TrainConfig, run_dir: Path, world: World, device: torch.device
) -> tuple[TrainingSet, CheckpointConfig, Codec]:
    """The data set as the network is to see it, what checkpoints will say of themselves, and what encoded it.

    Raises:
        ValueError: if sizes, or VAE and network, do not fit together, which is known before anything is encoded; or a
            label is beyond the network's classes.
    """
    network = model_config(config.model, **config.network)
    with torch.device("meta"):
        build_model(network)  # refuses sizes that do not fit together, before hours of encoding
    codec = create_codec(config.codec, device)
    size, channels, factor = network.input_size * config.codec.factor, network.in_channels, config.codec.factor
    if isinstance(codec, VAECodec) and (codec.latent_channels, codec.downsampling) != (channels, factor):
        raise ValueError(
            f"the VAE {config.codec.vae} makes latents of {codec.latent_channels} channels and 1/{codec.downsampling} "
            f"of the side, and {config.model} is to take {channels} channels and 1/{factor}: choose another "
            f"--codec.vae, or set --codec.factor {codec.downsampling} and --network.in_channels {codec.latent_channels}"
        )
    data = open_training_set(config.data, codec, size, channels, seed=config.seed, run_dir=run_dir, world=world)
    description = config.checkpoint_config(data.class_names, "")
    fitting_labels(data.labels, description.network.num_classes)
    return data, description, codec


def create_batches(
    data: TrainingSet,
    state: TrainState,
    config: TrainConfig,
    network: NetworkConfig,
    device: torch.device,
    world: World,
) -> Generator[Batch, None, None]:
    """This rank's share of the batches that are still to come."""
    settings = config.data
    process = create_process(config.process_config)  # the workers' own: the network's keeps tables on the GPU
    batches = NoisyBatches(
        data, network.num_classes, process, config.seed, network.class_dropout_prob, settings.augment
    )
    sampler = BatchSampler(
        len(data.labels),
        config.batch_size,
        seed=config.seed,
        flip=settings.flip and not settings.augment,  # which mirrors, and tells the network so
        steps=range(state.step, config.steps),
        rank=world.rank,
        world_size=world.size,
    )
    return training_batches(batches, sampler, settings.workers, device)


def check_shares(config: TrainConfig, world: World) -> None:
    """Raise ValueError for a batch of which the ranks, or the parts that each computes it in, have no equal shares."""
    size, ranks = config.batch_size, world.size
    if size % ranks:
        raise ValueError(f"--batch_size {size} cannot be shared by {ranks} ranks: choose a multiple")
    if size % (ranks * config.accumulate):
        raise ValueError(
            f"--batch_size {size} cannot be shared by {ranks} ranks in {config.accumulate} parts each: choose a "
            "multiple, or another --accumulate"
        )


def create_state(config: TrainConfig, network: NetworkConfig, device: torch.device, world: World) -> TrainState:
    """Network, EMAs and optimizer at step 0, the same in all ranks.

    Raises:
        ValueError: if the network cannot be sharded, or its blocks not recomputed, or --init_from does not fit.
    """
    torch.manual_seed(config.seed)  # the same initial weights in every rank
    model = initial_model(config, network, world).to(device).train()
    emas = {name: EMA(model) for name in ema_files(config)}
    if config.activation_checkpointing:
        apply_activation_checkpointing(model)
    if config.parallel == "fsdp":
        if world.size == 1:
            raise ValueError("--parallel fsdp shares a network out over ranks and there is one: start it with torchrun")
        for each in (model, *(ema.model for ema in emas.values())):
            shard(each, world, device)
    adam = config.optimizer
    trained = [p for p in model.parameters() if p.requires_grad]
    return TrainState(
        model=model,
        forward=parallelize(model, config, device, world),
        emas=emas,
        process=create_process(config.process_config),
        optimizer=torch.optim.AdamW(trained, adam.lr, adam.betas, weight_decay=adam.weight_decay, fused=True),
        scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
        sums=torch.zeros(4, device=device),
    )


def made_after(config: TrainConfig) -> str:
    """What made the weights that --init_from names, or where they are, as it ends the sentence; empty without it."""
    if config.init_from is None:
        return ""
    source, found = find_start(config)
    return f", after {found.made_by or source}"
