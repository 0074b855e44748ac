"""A GIF of sampling: one sample of every class, each frame what the network believes the images will be.

    python tools/denoising.py [WEIGHTS] [OUT.gif]       # by default Diffit-Fashion, docs/assets/denoising.gif

The belief is a state's `pred_xstart`, decoded: a picture from the first step on, where the state itself is noise.
"""

import io
import sys
from pathlib import Path

from PIL import Image

from diffit import ImageSampler
from diffit.cli.run import one_sentence
from diffit.system.files import write_atomically

COLUMNS, SIDE, GAP = 5, 96, 8  # of the grid; pixels
MILLISECONDS, AT_THE_END = 160, 2500  # of a frame


@one_sentence()
def main(weights: str = "Diffit-Fashion", out: str = "docs/assets/denoising.gif") -> None:
    pictures = ImageSampler.load(weights)
    indices = range(min(10, pictures.config.network.num_classes or 10))
    labels = pictures.labels(indices, seed=0, wanted=indices if pictures.config.network.num_classes else ())
    frames = []
    for state in pictures.states(indices, labels, seed=0):
        if state.step % 2 and state.step < state.num_steps:  # every second one, and the last, keep the file small
            continue
        page = Image.new("RGB", (COLUMNS * (SIDE + GAP) - GAP, -(-len(indices) // COLUMNS) * (SIDE + GAP) - GAP))
        for i, image in enumerate(pictures.codec.decode(state.pred_xstart).cpu().numpy()):
            enlarged = Image.fromarray(image.squeeze()).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            page.paste(enlarged, (i % COLUMNS * (SIDE + GAP), i // COLUMNS * (SIDE + GAP)))
        frames.append(page.quantize(24))
    times = [MILLISECONDS] * (len(frames) - 1) + [AT_THE_END]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0, optimize=True)
    write_atomically(Path(out), buffer.getvalue())
    print(f"{out}: {len(frames)} frames, {len(buffer.getvalue()):,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
