"""The page of app.py shows what `sample_images` draws and sample.py writes; it is used here in Chromium."""

import io
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from diffit import load_model, sample_images
from diffit.cli.app import parse_app
from diffit.cli.sample import parse_sample
from diffit.sampling.attention import average, draw_attention, watch
from diffit.sampling.folder import draw_grid
from diffit.sampling.generate import generate
from tests.conftest import ROOT
from tests.small_models import save_small_checkpoint, save_small_image_checkpoint, save_small_vae

demo = pytest.importorskip("diffit.demo", reason="needs Gradio")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]


def written(command, folder, monkeypatch):
    """The PNG that a command line of sample.py writes, as the page says where."""
    python, script, *flags = shlex.split(command)
    assert (python, script) == ("python", "sample.py")
    monkeypatch.chdir(folder)
    generate(parse_sample([*flags, "--device", "cpu"]))
    return np.asarray(Image.open(folder / "logs/app/png/000000.png"))


@pytest.mark.parametrize("kind", ["latent", "image", "without classes"])
def test_the_command_line_makes_the_same_picture(kind, tmp_path, monkeypatch):
    if kind == "latent":
        path = save_small_checkpoint(tmp_path, save_small_vae(tmp_path / "vae"))
        fields = [2, 5, "ddim", "power_cosine", "4", 2.5]
    else:
        path = save_small_image_checkpoint(tmp_path, num_classes=0 if kind == "without classes" else 3)
        fields = [1, 5, "heun", "constant", " 3 ", 2.5]
    page = demo.load_demo(parse_app(["--model_path", str(path), "--device", "cpu"]))
    settings = demo.read_settings(page, *fields)
    frames = list(demo.denoise(page.pictures, settings))
    assert frames[-1].done == 1
    assert [frame.words for frame in frames[:1]] == [f"step 1 of {fields[4].strip()}"]
    picture = written(demo.command(page, settings), tmp_path, monkeypatch)
    np.testing.assert_array_equal(frames[-1].image.squeeze(), picture)


def test_closing_the_frames_stops_the_sampling(tmp_path):
    """The network is not called again, and no thread goes on."""
    path = save_small_checkpoint(tmp_path, save_small_vae(tmp_path / "vae"))
    page = demo.load_demo(parse_app(["--model_path", str(path), "--device", "cpu"]))
    calls = []
    page.pictures.network.register_forward_hook(lambda *_: calls.append(threading.active_count()))
    threads = threading.active_count()
    frames = demo.denoise(page.pictures, demo.read_settings(page, 0, 0, "ddpm", "auto", "1000", 2))
    assert next(frames).words == "step 1 of 1000"
    frames.close()
    time.sleep(0.1)
    assert calls == [threads]


@pytest.mark.parametrize("kind", ["latent", "image"])
def test_what_is_shown_on_the_way(kind, tmp_path, monkeypatch):
    """The predicted x_start by default and, with the switch, the state; the finished picture is the same."""
    monkeypatch.setattr(demo, "_SECONDS", 0)
    monkeypatch.setattr(demo, "_PATIENCE", 0)  # every step is shown
    if kind == "latent":
        path = save_small_checkpoint(tmp_path, save_small_vae(tmp_path / "vae"))
    else:
        path = save_small_image_checkpoint(tmp_path, num_classes=3)
    page = demo.load_demo(parse_app(["--model_path", str(path), "--device", "cpu"]))
    sampler = page.pictures.config.sampling.sampler
    settings = demo.read_settings(page, 1, 5, sampler, "auto", "4", 2.5)
    pictures = page.pictures.with_settings(num_sampling_steps=4, cfg_scale=2.5)
    states = list(pictures.states([0], pictures.labels([0], 5, [1]), 5))
    for noisy in (False, True):
        frames = [frame.image for frame in demo.denoise(page.pictures, settings, noisy)]
        shown = [state.x if noisy else state.pred_xstart for state in states[:-1]] + [states[-1].x]
        np.testing.assert_array_equal(frames, np.concatenate([pictures.codec.decode(x).numpy() for x in shown]))
    assert (states[0].x - states[0].pred_xstart).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["latent", "image"])
def test_attention_while_it_is_drawn(kind, tmp_path):
    """The picture stays what it was; the maps are those of `sample_images`, at every step."""
    if kind == "latent":
        path = save_small_checkpoint(tmp_path, save_small_vae(tmp_path / "vae"))
        fields = [2, 5, "ddim", "auto", "4", 2.5]
    else:
        path = save_small_image_checkpoint(tmp_path, num_classes=3)
        fields = [1, 5, "heun", "constant", "3", 2.5]
    page = demo.load_demo(parse_app(["--model_path", str(path), "--device", "cpu"]))
    settings, at = demo.read_settings(page, *fields), (0.5, 0.25)
    plain, expected = list(demo.denoise(page.pictures, settings)), []
    config, model = page.pictures.config, page.pictures.network
    config = replace(config, guidance=replace(config.guidance, schedule=settings["schedule"]))
    with watch(model, at) as maps:

        def look():
            return average([seen[:1] for seen in maps.values()])[0]

        others = {name: value for name, value in settings.items() if name != "schedule"}
        sample_images(model, config, 1, **others, callback=lambda *_: expected.append(look()))
        frames = list(demo.denoise(page.pictures, settings, look=look))
    np.testing.assert_array_equal(frames[-1].image, plain[-1].image)
    np.testing.assert_array_equal([frame.seen for frame in frames], expected)
    assert len(frames) == int(fields[4])
    strip = np.asarray(draw_attention([(frame.image, frame.seen, frame.words) for frame in frames], at))
    assert (strip == (255, 0, 0)).all(-1).any()  # the token is marked


@pytest.mark.parametrize("kind", ["latent", "image"])
def test_fields_are_checked_before_the_first_picture(kind, tmp_path):
    if kind == "latent":
        path = save_small_checkpoint(tmp_path, save_small_vae(tmp_path / "vae"))
    else:
        path = save_small_image_checkpoint(tmp_path, num_classes=3)
    page = demo.load_demo(parse_app(["--model_path", str(path), "--device", "cpu"]))
    sampler = page.pictures.config.sampling.sampler
    fields = {"label": 1, "seed": 2, "sampler": sampler, "schedule": "constant", "steps": "3", "scale": "1.5"}
    assert demo.read_settings(page, **fields)["seed"] == 2
    for name, value, words in (
        ("seed", None, "the field 'Seed' is empty"),
        ("seed", 1.5, "the seed must be a whole number, not 1.5"),
        ("steps", "  ", "the field 'Steps' is empty"),
        ("steps", "0", "0"),
        ("steps", "many", "many"),
        ("scale", None, "the field 'Guidance scale' is empty"),
        ("scale", "much", "the guidance scale must be a number, not much"),
        ("scale", "-2", "the guidance scale must be at least 0, not -2"),
        ("scale", "1e30", "guidance.scale"),
        ("sampler", "euler", "does not fit"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            demo.read_settings(page, **fields | {name: value})


def test_a_port_in_use_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match=r"port \d+ of 127\.0\.0\.1 cannot be used: choose another with --port"):
            demo.serve(parse_app(["--port", str(taken.getsockname()[1]), "--device", "cpu"]))


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Where app.py serves the bundled model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "app.py"), "--port", str(port), "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path_factory.mktemp("cwd")) as process:
        line = process.stdout.readline()
        yield re.search(r"http://127\.0\.0\.1:\d+/", line)[0]
        process.terminate()


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, 800), (390, 844)], ids=["desktop", "phone"])
def page(browser, url, request):
    """The page. In the end it logged no error, asked nothing of other hosts, and is no wider than the screen."""
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(30_000)
    errors, asked = [], []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda sent: asked.append(sent.url))
    page.goto(url)
    yield page
    assert errors == []
    assert [address for address in asked if not address.startswith((url, "data:", "blob:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def wait_for(page, words):
    page.locator(".html-container:visible", has_text=re.compile(words)).wait_for()


def press(page, name):
    """Click when the page has also dealt with the end of what ran before, a moment after it shows it."""
    page.wait_for_timeout(300)
    page.get_by_role("button", name=name).click()


def image_of(page, style):
    """The pixels that the page shows."""
    response = page.request.get(page.locator(f".{style}:visible img").get_attribute("src"))
    return Image.open(io.BytesIO(response.body()))


def test_a_picture_is_there_on_opening(page):
    """It is that of the settings that the page shows, in both tabs that show one; one of them enlarges it."""
    images, _ = sample_images(*load_model("Diffit-Fashion"), 1, class_labels=0)
    for tab, zoom in (("Attention", 16), ("One picture", 1)):
        page.get_by_role("tab", name=tab).click()
        page.locator(".picture:visible img").wait_for()
        shown = np.asarray(image_of(page, "picture"))
        np.testing.assert_array_equal(shown, images[0, :, :, 0].repeat(zoom, 0).repeat(zoom, 1))


def test_a_picture_step_by_step(page, tmp_path, monkeypatch):
    page.get_by_label("Class").click()
    page.wait_for_timeout(300)
    page.keyboard.type("boot")
    page.get_by_role("option").nth(1).wait_for(state="hidden")  # one is left
    page.get_by_role("option").click()
    page.get_by_label("Seed").fill("3")
    page.get_by_label("Sampler").click()
    page.get_by_role("option", name="ddim").click()
    page.get_by_label("Steps").fill("60")
    page.get_by_label("Guidance scale").fill("2.5")
    press(page, "Generate")
    wait_for(page, r"step \d+ of 60")
    wait_for(page, "done in")
    model, config = load_model("Diffit-Fashion")
    images, _ = sample_images(
        model, config, 1, seed=3, class_labels="Ankle boot", sampler="ddim", num_sampling_steps=60, cfg_scale=2.5
    )
    np.testing.assert_array_equal(np.asarray(image_of(page, "picture")), images[0, :, :, 0])
    with page.expect_download() as download:
        page.locator(".picture:visible").get_by_label("Download").click()
    assert download.value.suggested_filename == "Ankle-boot-seed-3-step-60.png"
    np.testing.assert_array_equal(np.asarray(Image.open(download.value.path())), images[0, :, :, 0])
    command = page.locator(".command textarea").input_value()
    np.testing.assert_array_equal(written(command, tmp_path, monkeypatch), images[0, :, :, 0])


def test_stop_and_refusals(page):
    page.get_by_label("Steps").fill("1000")
    press(page, "Generate")
    wait_for(page, r"step \d+ of 1000")
    press(page, "Stop")
    wait_for(page, "stopped")
    for label, text, words in (
        ("Steps", "5000", "--num_sampling_steps must be between 1 and 1000, not 5000"),
        ("Seed", "-1", "the seed must be between 0 and 2^64 - 1, not -1"),
        ("Guidance scale", "-2", "the guidance scale must be at least 0, not -2"),
    ):
        field = page.get_by_label(label, exact=True)
        field.fill(text)
        press(page, "Generate")
        page.get_by_text(words).wait_for()
        field.fill("2")
    press(page, "Generate")
    wait_for(page, "done in")


def test_stop_is_for_its_own_page(page, browser, url):
    """Of two pages of the same server, Stop on one leaves the run of the other alone."""
    page.get_by_label("Steps").fill("1000")
    press(page, "Generate")
    wait_for(page, r"step \d+ of 1000")
    other = browser.new_page()
    other.goto(url)
    press(other, "Stop")
    other.close()
    progress = page.locator(".html-container:visible")
    before = progress.inner_text()
    page.wait_for_timeout(1000)
    wait_for(page, r"step \d+ of 1000")
    assert progress.inner_text() != before
    press(page, "Stop")
    wait_for(page, "stopped")


def test_stop_also_ends_a_run_that_waits(page, browser, url):
    """Of two pages, one runs and one waits; the one that waited never begins."""
    page.get_by_label("Steps").fill("1000")
    press(page, "Generate")
    wait_for(page, r"step \d+ of 1000")
    other = browser.new_page()
    other.goto(url)
    other.get_by_label("Steps").fill("2")
    press(other, "Generate")
    other.get_by_text("queue: 1/1").wait_for()
    press(other, "Stop")
    wait_for(other, "stopped")
    press(page, "Stop")
    wait_for(page, "stopped")
    other.wait_for_timeout(1000)
    wait_for(other, "stopped")
    assert other.locator(".command textarea").input_value() == ""  # it never drew
    press(other, "Generate")
    wait_for(other, "done in")
    other.close()


def test_a_stopped_run_leaves_nothing_in_the_next(page):
    """Attention is stopped on its way; the picture that follows is that of `sample_images`."""
    page.get_by_role("tab", name="Attention").click()
    page.get_by_role("tabpanel").get_by_label("Steps").fill("1000")
    press(page, "Watch")
    wait_for(page, r"step \d+ of 1000")
    press(page, "Stop")
    wait_for(page, "stopped")
    page.get_by_role("tab", name="One picture").click()
    page.get_by_role("tabpanel").get_by_label("Steps").fill("4")
    page.get_by_label("Show the noisy state").check()
    press(page, "Generate")
    wait_for(page, "done in")
    images, _ = sample_images(*load_model("Diffit-Fashion"), 1, class_labels=0, num_sampling_steps=4)
    np.testing.assert_array_equal(np.asarray(image_of(page, "picture")), images[0, :, :, 0])


def test_sweep(page):
    page.get_by_role("tab", name="Sweep").click()
    for label in ("Steps", "Guidance scales"):
        field = page.get_by_role("tabpanel").get_by_label(label, exact=True)
        field.click()
        for _ in range(2):
            field.press("Backspace")
        field.press("Escape")
    press(page, "Sweep")
    wait_for(page, "^ *done$")
    model, config = load_model("Diffit-Fashion")
    cells = [(scale, steps) for scale in (1, 1.5) for steps in (5, 10)]
    images = [
        sample_images(model, config, 1, class_labels=0, num_sampling_steps=steps, cfg_scale=scale)[0][0]
        for scale, steps in cells
    ]
    expected = draw_grid(images, [f"s = {scale}, {steps} steps" for scale, steps in cells], columns=2)
    np.testing.assert_array_equal(np.asarray(image_of(page, "grid")), np.asarray(expected))


def test_attention(page):
    """The strip of the tab's last moment holds the finished picture of `sample_images`, but for the mark.

    A click on the picture, here into its token (1, 6) of 8 x 8, watches that one.
    """
    page.get_by_role("tab", name="Attention").click()
    panel = page.get_by_role("tabpanel")
    panel.get_by_label("Steps").fill("8")
    press(page, "Watch")
    wait_for(page, "done in")
    model, config = load_model("Diffit-Fashion")
    images, _ = sample_images(model, config, 1, class_labels=0, num_sampling_steps=8)
    zoomed = images[0, :, :, 0].repeat(4, 0).repeat(4, 1)

    def check(row, column):
        strip = image_of(page, "grid")
        shown = np.asarray(strip.convert("L"))[28 : 28 + 128, -136:-8]
        assert (shown == zoomed).mean() > 0.97
        red = (np.asarray(strip)[28 : 28 + 128, -136:-8] == (255, 0, 0)).all(-1)
        assert [(int(x.min()) // 16, int(x.max()) // 16) for x in np.nonzero(red)] == [(row, row), (column, column)]

    check(4, 4)
    picture = page.locator(".picture:visible img")
    box = picture.bounding_box()
    side = min(box["width"], box["height"])  # the picture is square, in the middle
    corner = (box["width"] - side) / 2, (box["height"] - side) / 2
    picture.click(position={"x": corner[0] + side * 6.5 / 8, "y": corner[1] + side * 1.5 / 8})
    wait_for(page, r"step \d+ of 8")
    wait_for(page, "done in")
    check(1, 6)
    with page.expect_download() as download:
        page.locator(".grid:visible").get_by_label("Download").click()
    assert download.value.suggested_filename == "T-shirt-top-seed-0-attention.png"
