"""The command app.py."""

from __future__ import annotations

from collections.abc import Sequence

from diffit.checkpoint.resolve import find_checkpoint
from diffit.cli.parser import build, given_arguments, parse
from diffit.cli.run import one_sentence
from diffit.cli.settings import Command
from diffit.sampling.config import AppConfig, AppTask

GRADIO = 'the page needs Gradio: pip install "diffit[demo]"'
COMMAND = Command(
    AppConfig,
    prog="app.py",
    description="A page to play with a DiffiT checkpoint in the browser: python app.py --model Diffit-Fashion",
    epilog=f"{GRADIO}.",
    everyday=("model", "model_path", "port"),
)


@one_sentence()
def main() -> None:
    """Parse, load, serve until Ctrl-C."""
    task = parse_app()
    try:
        from diffit.demo import serve  # loads PyTorch and Gradio, which --help does without
    except ModuleNotFoundError as error:
        raise ValueError(GRADIO) if error.name == "gradio" else error from None
    serve(task)


@one_sentence()
def parse_app(argv: Sequence[str] | None = None) -> AppTask:
    """Resolve app.py's command line. Ends the program with one sentence and exit code 2 if it cannot be."""
    config = build(AppConfig, parse(COMMAND, given_arguments(COMMAND, argv)))
    return AppTask(config, *find_checkpoint(config.model, config.model_path, config.image_size))
