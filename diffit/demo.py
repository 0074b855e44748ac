"""The page of app.py, where a checkpoint is played with in the browser. A tab is a function; `TABS` lists them."""

from __future__ import annotations

import contextlib
import copy
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
import numpy as np
from gradio.components import Component
from numpy.typing import NDArray
from PIL import Image

from diffit.checkpoint.resolve import BUNDLED
from diffit.checkpoint.weights import load_weights
from diffit.config import PIXELS
from diffit.data.files import picture_of
from diffit.diffusion.config import SAMPLERS
from diffit.sampling.attention import Position, average, draw_attention, watch
from diffit.sampling.config import AppTask
from diffit.sampling.folder import draw_grid, save_png
from diffit.sampling.images import ImageSampler
from diffit.sampling.labels import class_names
from diffit.settings import Range, check_setting
from diffit.system.console import say
from diffit.system.device import resolve_device, set_matmul_precision

_SECONDS = 0.1  # between two pictures of a sample on its way
_PATIENCE = 4  # times as long as a picture takes, which slow VAEs may, so that denoising stays most of the work
_MOST_PICTURES = 36  # of a sweep
_MOMENTS = 5  # of the strip of attention maps, of which more would be too small to read
_CLICKABLE = (512, 512)  # pixels: Gradio finds the place of a click in no picture that the browser has to enlarge
# A picture that is downloaded as a PNG of the very pixels.
_image = partial(gr.Image, show_label=False, format="png", buttons=["download", "fullscreen"], render=False)
_picture = partial(_image, elem_classes="picture", height="min(24rem, 84vw)")
_CSS = """
.gradio-container {width: 100%; max-width: 1100px !important; margin: 0 auto !important}
.picture img {image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain}
.grid button, .grid .image-frame {overflow-x: auto; justify-content: safe center}
.grid img {padding-top: 2.5em; background: white; width: auto; min-width: 100%; max-width: none; flex: none}
.command textarea {font-family: var(--font-mono); font-size: var(--text-sm)}
progress {width: 100%; accent-color: var(--color-accent)}
"""

# Of one picture: `seed`, `class_labels`, and what `ImageSampler.with_settings` takes.
Settings = dict[str, Any]


@dataclass(frozen=True)
class Demo:
    """What the page shows: samples of a checkpoint, its class names, and the flags of sample.py that name it."""

    pictures: ImageSampler
    names: Sequence[str]
    flags: Settings


@dataclass(frozen=True)
class Frame:
    """A sample on its way: the step, also as a part of all and in words; the image uint8 [H, W, C]; what `look` saw."""

    step: int
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
        # The page would load any other fonts from the internet.
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        look: dict[str, Any] = {"css": _CSS, "theme": theme, "footer_links": [], "ssr_mode": False, "quiet": True}
        place: dict[str, Any] = {"server_name": "127.0.0.1", "server_port": task.config.port}
        _, url, _ = page.launch(**place, **look, prevent_thread_lock=True)
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
    flags: Settings = {"model": task.checkpoint.model, "model_path": task.config.model_path}
    flags |= {"image_size": task.config.image_size, "device": device.type}
    return Demo(ImageSampler.create(model, task.checkpoint, device), class_names(task.checkpoint), flags)


def read_settings(
    demo: Demo, label: int | None, seed: float | None, sampler: str, schedule: str, steps: str, scale: Any
) -> Settings:
    """The settings in the fields of the page, whose values come in the order of the fields.

    Raises:
        ValueError: naming the field that is empty or holds no number, or if a setting does not fit the process.
    """
    steps = steps.strip()
    for name, value in {"Seed": seed, "Steps": steps, "Guidance scale": scale if demo.names else 1}.items():
        if value in (None, ""):
            raise ValueError(f"the field '{name}' is empty: fill it in")
    settings: Settings = {"sampler": sampler}
    settings["num_sampling_steps"] = int(steps) if steps.isdecimal() else steps  # "ddim50" is a choice of steps too
    if demo.names:
        with contextlib.suppress(ValueError):  # of a sweep, scales are texts
            scale = float(scale)
        settings["cfg_scale"] = check_setting("the guidance scale", float, Range(at_least=0), scale)
        settings["schedule"] = schedule
    demo.pictures.with_settings(**settings)  # refuses what does not fit, of a sweep before its first picture
    settings["seed"] = check_setting("the seed", int, Range(0, at_most=2**64 - 1), seed)
    return settings | ({"class_labels": label} if demo.names else {})


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
            yield Frame(state.step, state.step / state.num_steps, words, image, look and look())
            due = time.monotonic() + max(_SECONDS, _PATIENCE * (time.monotonic() - before))


def saved(folder: Path, demo: Demo, settings: Settings, image: Image.Image, what: str) -> str:
    """A picture as a file, which is downloaded under its name: class or model, seed and what it shows."""
    label = settings.get("class_labels")
    name = demo.pictures.config.model if label is None else demo.names[label]
    path = folder / (re.sub(r"\W+", "-", f"{name[:80]} seed {settings['seed']} {what}") + ".png")
    save_png(path, image)
    return str(path)


def command(demo: Demo, settings: Settings) -> str:
    """The command line that makes the same picture, logs/app/png/000000.png."""
    flags = demo.flags | settings | {"num_samples": 1, "log_dir": "logs/app", "save_png": True, "overwrite": True}
    flags["guidance.schedule"], label = flags.pop("schedule", None), settings.get("class_labels")
    flags["cfg_cond"] = True if demo.names else None
    if label is not None and list(demo.names).count(demo.names[label]) == 1:  # some names are numbers of other classes
        flags["class_labels"] = demo.names[label]
    words = (word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value)))
    return shlex.join(["python", "sample.py", *words])


def build_page(demo: Demo) -> gr.Blocks:
    """What all tabs have in common beside the tabs; what means nothing to the checkpoint is hidden."""
    config, guided, names = demo.pictures.config, bool(demo.names), list(demo.names)
    sampling, guidance = config.sampling, config.guidance
    classes = f"{len(demo.names)} classes, " if demo.names else ""
    process = f"{config.process_config.title} {'of pixels' if config.codec.vae == PIXELS else 'in latents'}"
    schedules = ["auto", *config.process_config.guidance_schedules]
    blocks = gr.Blocks(title=f"DiffiT: {config.model}", analytics_enabled=False, delete_cache=(3600, 3600))
    with TemporaryDirectory() as folder, blocks as page:
        first: list[str] = []
        if config.model in BUNDLED:  # which is small: the picture of the recommended settings is there at once
            fields = sampling.sampler, guidance.schedule, str(sampling.num_sampling_steps), guidance.scale
            *_, last = denoise(demo.pictures, settings := read_settings(demo, 0, 0, *fields))
            images = {f"step {last.step}": picture_of(last.image), "large": _clickable(last)}
            first = [saved(Path(folder), demo, settings, image, what) for what, image in images.items()]
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
                    gr.Dropdown(list(SAMPLERS[config.process]), value=sampling.sampler, label="Sampler"),
                    gr.Dropdown(schedules, value=guidance.schedule, label="Guidance schedule", visible=guided),
                ]
                # What is typed replaces the class that is shown, and finds another.
                common[0].focus(None, js="() => document.activeElement.select()", api_visibility="private")
            with gr.Column(scale=3):
                for title, tab in TABS.items():
                    with gr.Tab(title):
                        tab(demo, common, *first)
    return page


def picture_tab(demo: Demo, common: Sequence[Component], first: str | None = None, _: str | None = None) -> None:
    """One picture, seen while it is denoised, and the command line that makes it."""

    def run(folder: Path, *values: Any) -> Iterator[Sequence[Any]]:
        *fields, noisy = values
        settings = read_settings(demo, *fields)
        for frame in denoise(demo.pictures, settings, noisy):
            shown = saved(folder, demo, settings, picture_of(frame.image), f"step {frame.step}")
            yield _progress(frame.done, frame.words), shown, command(demo, settings) if frame.done == 1 else None

    steps_and_scale = _steps_and_scale(demo)
    noisy = gr.Checkbox(label="Show the noisy state x_t, not what the network believes the picture will be")
    label = "The same picture, as logs/app/png/000000.png"
    line = gr.Textbox(label=label, buttons=["copy"], elem_classes="command", render=False)
    _run_below("Generate", run, [*common, *steps_and_scale, noisy], [_picture(first), line])


def sweep_tab(demo: Demo, common: Sequence[Component], *_: str) -> None:
    """One seed over guidance scales and numbers of steps, as a labelled grid: a row a scale, a column a number."""

    def run(folder: Path, *values: Any) -> Iterator[Sequence[Any]]:
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
                sheet = draw_grid(images, titles, columns=len(steps))
                yield _progress(whole, words), saved(folder, demo, cell, sheet, "sweep")

    scales, steps = ["1", "1.5", "3", "6"], ["5", "10", "25", "50"]
    several = partial(gr.Dropdown, multiselect=True, allow_custom_value=True, info="choose, or type others")
    inputs = [
        *common,
        several(steps, value=steps, label="Steps"),
        several(scales, value=scales, label="Guidance scales", visible=bool(demo.names)),
    ]
    _run_below("Sweep", run, inputs, [_image(elem_classes="grid")])


def attention_tab(demo: Demo, common: Sequence[Component], _: str | None = None, first: str | None = None) -> None:
    """Where a token looks while a picture comes into being: pictures, and below them maps, over the steps."""

    def run(folder: Path, *values: Any) -> Iterator[Sequence[Any]]:
        *fields, at = values
        settings = read_settings(demo, *fields)
        frames: list[Frame] = []
        model: Any = demo.pictures.network
        # A network of the same weights: should a run be stopped here, nothing watches the next one.
        network = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        watched = replace(demo.pictures, network=network)
        with watch(network, at) as maps:
            for frame in denoise(watched, settings, look=lambda: average([seen[:1] for seen in maps.values()])[0]):
                frames.append(frame)
                chosen = np.linspace(0, len(frames) - 1, min(_MOMENTS, len(frames))).round().astype(int)
                strip = draw_attention([(frames[i].image, frames[i].seen, frames[i].words) for i in chosen], at)
                files = ((_clickable(frame), f"step {frame.step}"), (strip, "attention"))
                yield _progress(frame.done, frame.words), *(saved(folder, demo, settings, *file) for file in files)

    def clicked(event: gr.SelectData) -> Position:
        return event.index[1] / _CLICKABLE[1], event.index[0] / _CLICKABLE[0]

    gr.Markdown(
        "Where the token in the red box looks, mean over heads and blocks; 2x is twice as much as if it looked "
        "everywhere alike. A click on the picture takes another token."
    )
    steps_and_scale, at, shown = _steps_and_scale(demo), gr.State((0.5, 0.5)), _picture(first)
    shown.select(clicked, None, at, show_progress="hidden", api_visibility="private")
    _run_below("Watch", run, [*common, *steps_and_scale, at], [shown, _image(elem_classes="grid")], at.change)


TABS: dict[str, Callable[..., None]] = {  # of the demo, the fields of all tabs, and perhaps two files of a picture
    "One picture": picture_tab,
    "Sweep": sweep_tab,
    "Attention": attention_tab,
}


def _steps_and_scale(demo: Demo) -> tuple[Component, Component]:
    """Two fields side by side, as the checkpoint recommends."""
    with gr.Row():
        config, guided = demo.pictures.config, bool(demo.names)
        steps = gr.Textbox(str(config.sampling.num_sampling_steps), label="Steps", min_width=120)
        scale = gr.Number(config.guidance.scale, label="Guidance scale", step=0.1, min_width=120, visible=guided)
    return steps, scale


def _run_below(
    title: str,
    run: Callable[..., Iterator[Sequence[Any]]],
    inputs: Sequence[Component],
    outputs: Sequence[Component],
    *triggers: Any,
) -> None:
    """Buttons that start and stop a run, its progress, and its outputs. Of the whole page, one run goes at a time.

    Args:
        title: of the first button.
        run: (a folder for files, *inputs) -> progress and outputs, again and again; its ValueErrors are shown.
        inputs: on the page already.
        outputs: not rendered yet.
        triggers: events that start it too.
    """

    def guarded(*values: Any) -> Iterator[Sequence[Any]]:
        try:
            with TemporaryDirectory() as folder:  # Gradio copies each file before it asks for the next
                yield from run(Path(folder), *values)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    with gr.Row():
        start = gr.Button(title, variant="primary", min_width=120)
        end = gr.Button("Stop", min_width=120)
    progress = gr.HTML(_progress(0, "ready"))
    for output in outputs:
        output.render()
    options = {"concurrency_id": "sampling", "show_progress": "minimal", "show_progress_on": progress}
    going = gr.on([start.click, *triggers], guarded, inputs, [progress, *outputs], **options, api_visibility="private")
    # Gradio takes a run out of the queue, or closes its generator between two steps.
    ended = end.click(None, cancels=[going], queue=False, api_visibility="private")
    ended.then(lambda: _progress(0, "stopped"), None, progress, queue=False, api_visibility="private")


def _clickable(frame: Frame) -> Image.Image:
    return picture_of(frame.image).resize(_CLICKABLE, Image.Resampling.NEAREST)


def _progress(done: float, words: str) -> str:
    return f'<progress value="{done:.3f}"></progress> {words}'
