"""The configuration of app.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from diffit.checkpoint import CheckpointConfig, Source, find_checkpoint
from diffit.cli.parser import build_parser, config_first, fail, parse
from diffit.device import Device


@dataclass(frozen=True)
class AppConfig:
    """What app.py does.

    Args:
        model: a model of the zoo; without --model_path its bundled or released weights are used. Diffit-Fashion, the
            bundled one, unless a file says otherwise.
        model_path: weights: a .safetensors or .pt file, or a Hub file owner/repository/name.safetensors.
        image_size: side of the images in pixels, 256 or 512 for the released weights; by default the checkpoint's.
        device: where to sample; auto takes a GPU if there is one.
        port: of 127.0.0.1, where the page is; other machines cannot reach it.
    """

    model: str | None = None
    model_path: str | None = None
    image_size: int | None = None
    device: Device = "auto"
    port: int = 7860


@dataclass(frozen=True)
class AppTask:
    """A resolved command line of app.py: its settings, and the checkpoint that they speak of."""

    config: AppConfig
    source: Source
    checkpoint: CheckpointConfig


def parse_app(argv: Sequence[str] | None = None) -> AppTask:
    """Resolve app.py's command line. Ends the program with one sentence and exit code 2 if it cannot be."""
    parser = build_parser(
        AppConfig,
        prog="app.py",
        description="A page to play with a DiffiT checkpoint in the browser: python app.py --model Diffit-Fashion",
        epilog='The page needs Gradio: pip install "diffit[demo]"',
    )
    try:
        tree = parser.instantiate(parse(parser, config_first(sys.argv[1:] if argv is None else argv)))
        config = AppConfig(**{name: tree[name] for name in AppConfig.__dataclass_fields__})
        if not 1 <= config.port <= 65535:
            raise ValueError(f"--port must be between 1 and 65535, not {config.port}")
        return AppTask(config, *find_checkpoint(config.model, config.model_path, config.image_size))
    except (ValueError, OSError) as error:
        fail(str(error))
