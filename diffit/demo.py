"""The page of app.py, where a checkpoint is played with in the browser. A tab is a function; `TABS` lists them.

Letters: H x W x C of an image.
"""

from __future__ import annotations

import copy
import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gradio as gr
import numpy as np
from gradio.components import Component
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from diffit.checkpoint.weights import load_weights
from diffit.config import PIXELS
from diffit.data.files import picture_of
from diffit.diffusion.config import SAMPLERS
from diffit.sampling.attention import Position, average, watch
from diffit.sampling.config import AppTask
from diffit.sampling.folder import draw_grid
from diffit.sampling.images import ImageSampler
from diffit.sampling.labels import class_names
from diffit.system.console import say
from diffit.system.device import resolve_device, set_matmul_precision

_SECONDS = 0.1  # between two pictures of a sample on its way
_PATIENCE = 4  # times as long as a picture takes, which slow VAEs may, so that denoising stays most of the work
_MOST_PICTURES = 36  # of a sweep
_MOMENTS = 8  # of the strip of attention maps
# A picture that is downloaded as a PNG of the very pixels.
_image = partial(gr.Image, show_label=False, format="png", buttons=["download", "fullscreen"], render=False)
_CSS = """
.gradio-container {width: 100%; max-width: 1100px !important; margin: 0 auto !important}
.picture img {image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain}
.sweep img, .attention img {padding-top: 2.5em; background: white}
.command textarea {font-family: var(--font-mono); font-size: var(--text-sm)}
progress {width: 100%; accent-color: var(--color-accent)}
"""


# Of one picture: `seed`, `class_labels`, and what `ImageSampler.with_settings` takes.
Settings = dict[str, Any]
_FLAGS = {"schedule": "guidance.schedule"}  # of sample.py, where it is not the setting's own name


@dataclass(frozen=True)
class Demo:
    """What the page shows: samples of a checkpoint, its class names, and the flags of sample.py that name it."""

    pictures: ImageSampler
    names: Sequence[str]
    arguments: Sequence[str]


@dataclass(frozen=True)
class Frame:
    """A sample on its way: how far it is, 0 to 1, and in words; its image uint8 [H, W, C]; what `look` saw."""

    done: float
    words: str
    image: NDArray[np.uint8]
    seen: Any = None


def serve(task: AppTask) -> None:
    """Load the checkpoint and serve the page until Ctrl+C.

    Raises:
        ValueError: if the checkpoint cannot be loaded or the port is taken.
    """
    page = build_page(load_demo(task))
    try:
        _, url, _ = page.launch(
            server_name="127.0.0.1",
            server_port=task.config.port,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            ssr_mode=False,
            css=_CSS,
            # The page would load any other fonts from the internet.
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        )
    except OSError as error:
        raise ValueError(f"port {task.config.port} of 127.0.0.1 cannot be used: choose another with --port") from error
    say(f"{task.checkpoint.model} is at {url} (Ctrl+C ends it)")
    page.block_thread()


def load_demo(task: AppTask) -> Demo:
    """The network and the codec of a command line, on its device, as precise as sample.py is by default.

    Raises:
        ValueError: in one sentence, if they cannot be loaded.
    """
    device = resolve_device(task.config.device)
    set_matmul_precision("fp32")
    model = load_weights(task.source.fetch(), task.checkpoint).requires_grad_(False)
    named: Settings = {"model": task.checkpoint.model, "model_path": task.config.model_path}
    named |= {"image_size": task.config.image_size, "device": device.type}
    pictures = ImageSampler.create(model, task.checkpoint, device)
    return Demo(pictures, class_names(task.checkpoint), flags_of(named))


def flags_of(settings: Settings) -> list[str]:
    """Settings as a command line; what is None is left out."""
    given = {_FLAGS.get(name, name): value for name, value in settings.items() if value is not None}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def read_settings(
    demo: Demo, label: int | None, seed: float | None, sampler: str, schedule: str, steps: str, scale: Any
) -> Settings:
    """The settings in the fields of the page, whose values come in the order of the fields.

    Raises:
        ValueError: naming the field that is empty or holds no number, or if a setting does not fit the process.
    """
    steps, seed_or_0 = steps.strip(), seed or 0
    for name, value in {"Seed": seed, "Steps": steps, "Guidance scale": scale if demo.names else 1}.items():
        if value in (None, ""):
            raise ValueError(f"the field '{name}' is empty: fill it in")
    if seed_or_0 % 1:
        raise ValueError(f"the seed must be a whole number, not {seed}")
    settings: Settings = {"sampler": sampler}
    settings["num_sampling_steps"] = int(steps) if steps.isdecimal() else steps  # "ddim50" is a choice of steps too
    if demo.names:
        try:
            cfg_scale = float(scale)
        except (TypeError, ValueError):
            cfg_scale = math.nan
        if not 0 <= cfg_scale < math.inf:
            raise ValueError(f"the guidance scale must be a number of at least 0, not {scale}")
        settings |= {"cfg_scale": cfg_scale, "schedule": schedule}
    demo.pictures.with_settings(**settings)  # refuses what does not fit, of a sweep before its first picture
    return settings | {"seed": int(seed_or_0)} | ({"class_labels": label} if demo.names else {})


def denoise(
    pictures: ImageSampler, settings: Settings, noisy: bool = False, look: Callable[[], Any] | None = None
) -> Iterator[Frame]:
    """Sample 0 of these settings on its way, the finished image last.

    Args:
        settings: see `read_settings`.
        noisy: show the state x_t in place of what the network believes the picture will be.
        look: sees something of the network after each step that is shown, and then all steps are.

    Raises:
        ValueError: if a setting does not fit.
    """
    arguments = dict(settings)
    seed, label = arguments.pop("seed"), arguments.pop("class_labels", None)
    pictures = pictures.with_settings(**arguments)
    labels = pictures.labels([0], seed, [] if label is None else [label])
    start = due = time.monotonic()
    for state in pictures.states([0], labels, seed):
        last, before = state.step == state.num_steps, time.monotonic()
        if last or look or before >= due:
            image = pictures.codec.decode(state.x if last or noisy else state.pred_xstart)[0].cpu().numpy()
            words = f"done in {time.monotonic() - start:.1f} s" if last else f"step {state.step} of {state.num_steps}"
            yield Frame(state.step / state.num_steps, words, image, look and look())
            now = time.monotonic()
            due = now + max(_SECONDS, _PATIENCE * (now - before))


def command(demo: Demo, settings: Settings) -> str:
    """The command line that makes the same picture, logs/app/png/000000.png."""
    guided: Settings = {"cfg_cond": True} if demo.names else {}
    label = settings.get("class_labels")
    if label is not None and list(demo.names).count(demo.names[label]) == 1:  # some names are numbers of other classes
        guided["class_labels"] = demo.names[label]
    common = {"num_samples": 1, "log_dir": "logs/app", "save_png": True, "overwrite": True}
    return shlex.join(["python", "sample.py", *demo.arguments, *flags_of(settings | common | guided)])


def build_page(demo: Demo) -> gr.Blocks:
    """What all tabs have in common beside the tabs; what means nothing to the checkpoint is hidden."""
    config, guided, names = demo.pictures.config, bool(demo.names), list(demo.names)
    classes = f"{len(demo.names)} classes, " if demo.names else ""
    process = f"{config.process_config.title} {'of pixels' if config.codec.vae == PIXELS else 'in latents'}"
    schedules = ["auto", *config.process_config.guidance_schedules]
    with gr.Blocks(title=f"DiffiT: {config.model}", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(
            f"## {config.model}\n{config.image_size}x{config.image_size} pixels, {classes}{process}. "
            "The same settings always make the same picture."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=240):
                common: list[Any] = [
                    gr.Dropdown(
                        [(name if names.count(name) == 1 else f"{name} ({y})", y) for y, name in enumerate(names)],
                        value=0 if guided else None,
                        label="Class",
                        visible=guided,
                    ),
                    gr.Number(0, label="Seed"),
                    gr.Dropdown(list(SAMPLERS[config.process]), value=config.sampling.sampler, label="Sampler"),
                    gr.Dropdown(schedules, value=config.guidance.schedule, label="Guidance schedule", visible=guided),
                ]
                # What is typed replaces the class that is shown, and finds another.
                common[0].focus(None, js="() => document.activeElement.select()", api_visibility="private")
            with gr.Column(scale=3):
                for title, tab in TABS.items():
                    with gr.Tab(title):
                        tab(demo, common)
    return page


def picture_tab(demo: Demo, common: Sequence[Component]) -> None:
    """One picture, seen while it is denoised, and the command line that makes it."""

    def run(*values: Any) -> Iterator[Sequence[Any]]:
        *fields, noisy = values
        settings = read_settings(demo, *fields)
        for frame in denoise(demo.pictures, settings, noisy):
            line = command(demo, settings) if frame.done == 1 else None
            yield _progress(frame.done, frame.words), picture_of(frame.image), line

    steps_and_scale = _steps_and_scale(demo)
    noisy = gr.Checkbox(label="Show the noisy state x_t, not what the network believes the picture will be")
    shown = _image(elem_classes="picture", height="min(24rem, 84vw)")
    line = gr.Textbox(
        label="The same picture, as logs/app/png/000000.png", buttons=["copy"], elem_classes="command", render=False
    )
    _run_below("Generate", run, [*common, *steps_and_scale, noisy], [shown, line])


def sweep_tab(demo: Demo, common: Sequence[Component]) -> None:
    """One seed over guidance scales and numbers of steps, as a labelled grid: a row a scale, a column a number."""

    def run(*values: Any) -> Iterator[Sequence[Any]]:
        label, seed, sampler, schedule, steps, scales = values
        rows = scales if demo.names else [None]
        cells = [read_settings(demo, label, seed, sampler, schedule, n, scale) for scale in rows for n in steps]
        if not 0 < len(cells) <= _MOST_PICTURES:
            raise ValueError(f"a sweep makes 1 to {_MOST_PICTURES} pictures, not {len(cells)}: choose other values")
        side = demo.pictures.config.image_size
        title = "s = {cfg_scale:g}, {num_sampling_steps} steps" if demo.names else "{num_sampling_steps} steps"
        titles = [title.format(**cell) for cell in cells]
        images = [np.full((side, side, 1), 224, np.uint8)] * len(cells)  # grey until they are drawn
        for number, cell in enumerate(cells):
            for frame in denoise(demo.pictures, cell):
                images[number] = frame.image
                whole = (number + frame.done) / len(cells)
                words = f"picture {number + 1} of {len(cells)}, {frame.words}" if whole < 1 else "done"
                yield _progress(whole, words), draw_grid(images, titles, columns=len(steps))

    scales, steps = ["1", "1.5", "3", "6"], ["5", "10", "25", "50"]
    several = partial(gr.Dropdown, multiselect=True, allow_custom_value=True, info="choose, or type others")
    inputs = [
        *common,
        several(steps, value=steps, label="Steps"),
        several(scales, value=scales, label="Guidance scales", visible=bool(demo.names)),
    ]
    _run_below("Sweep", run, inputs, [_image(elem_classes="sweep")])


def attention_tab(demo: Demo, common: Sequence[Component]) -> None:
    """Where a token looks while a picture comes into being: pictures, and below them maps, over the steps."""

    def run(*values: Any) -> Iterator[Sequence[Any]]:
        *fields, row, column = values
        settings, at = read_settings(demo, *fields), (row / 100, column / 100)
        frames: list[Frame] = []
        model: Any = demo.pictures.network
        # A network of the same weights: should a run be stopped here, nothing watches the next one.
        network = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        watched = replace(demo.pictures, network=network)
        with watch(network, at) as maps:
            for frame in denoise(watched, settings, look=lambda: average([seen[:1] for seen in maps.values()])[0]):
                frames.append(frame)
                chosen = np.linspace(0, len(frames) - 1, min(_MOMENTS, len(frames))).round().astype(int)
                yield _progress(frame.done, frame.words), draw_attention([frames[i] for i in chosen], at)

    gr.Markdown(
        "Below each picture: where the token in the red box looks, mean over heads and blocks. 2x is twice as much as "
        "if it looked everywhere alike."
    )
    steps_and_scale = _steps_and_scale(demo)
    with gr.Row():
        token = [
            gr.Slider(0, 99, 50, step=1, label=f"{axis} of the token, % of the side") for axis in ("Row", "Column")
        ]
    inputs = [*common, *steps_and_scale, *token]
    _run_below("Watch", run, inputs, [_image(elem_classes="attention")])


def draw_attention(frames: Sequence[Frame], at: Position) -> Image.Image:
    """Images and, below them, maps [S, S] of what a token sees, the token marked in both; a column a frame."""
    highest = max(float(np.nanmax(frame.seen)) for frame in frames)
    images, titles = [], []
    for is_map in (False, True):
        for frame in frames:
            side, tokens = len(frame.image), len(frame.seen)
            shown = picture_of(frame.image).convert("RGB")
            if is_map:
                grey = Image.fromarray(np.nan_to_num(255 * frame.seen / highest).astype(np.uint8))
                coloured = ImageOps.colorize(grey, "#220044", "#ffee44", mid="#cc3355")
                shown = coloured.resize((side, side), Image.Resampling.NEAREST)
            top, left = (int(part * tokens) * side // tokens for part in at)
            box = (left, top, left + side // tokens - 1, top + side // tokens - 1)
            ImageDraw.Draw(shown).rectangle(box, outline="red")
            images.append(np.asarray(shown))
            titles.append(f"up to {np.nanmax(frame.seen):.1f}x" if is_map else frame.words)
    return draw_grid(images, titles, columns=len(frames))


TABS: dict[str, Callable[[Demo, Sequence[Component]], None]] = {
    "One picture": picture_tab,
    "Sweep": sweep_tab,
    "Attention": attention_tab,
}


def _steps_and_scale(demo: Demo) -> tuple[Component, Component]:
    """Two fields side by side, as the checkpoint recommends."""
    with gr.Row():
        steps = gr.Textbox(str(demo.pictures.config.sampling.num_sampling_steps), label="Steps", min_width=120)
        recommended, guided = demo.pictures.config.guidance.scale, bool(demo.names)
        scale = gr.Number(recommended, label="Guidance scale", step=0.1, min_width=120, visible=guided)
    return steps, scale


def _run_below(
    title: str,
    run: Callable[..., Iterator[Sequence[Any]]],
    inputs: Sequence[Component],
    outputs: Sequence[Component],
) -> None:
    """Buttons that start and stop a run, its progress, and its outputs. Of the whole page, one run goes at a time.

    Args:
        title: of the first button.
        run: (*inputs) -> progress and outputs, again and again; its ValueErrors are shown as messages.
        inputs: on the page already.
        outputs: not rendered yet.
    """

    def guarded(*values: Any) -> Iterator[Sequence[Any]]:
        try:
            yield from run(*values)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    with gr.Row():
        start = gr.Button(title, variant="primary", min_width=120)
        end = gr.Button("Stop", min_width=120)
    progress = gr.HTML(_progress(0, "ready"))
    for output in outputs:
        output.render()
    going = start.click(
        guarded,
        inputs,
        [progress, *outputs],
        concurrency_id="sampling",
        show_progress="minimal",
        show_progress_on=progress,
        api_visibility="private",
    )
    # Gradio takes a run out of the queue, or closes its generator between two steps.
    ended = end.click(None, cancels=[going], queue=False, api_visibility="private")
    ended.then(lambda: _progress(0, "stopped"), None, progress, queue=False, api_visibility="private")


def _progress(done: float, words: str) -> str:
    return f'<progress value="{done:.3f}"></progress> {words}'
