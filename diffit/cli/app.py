"""The command app.py."""

from __future__ import annotations

from collections.abc import Sequence

from diffit.checkpoint.resolve import find_checkpoint
from diffit.cli.parser import build_parser, fail, given_arguments, instantiate, refusing
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


def main() -> int:
    """Parse, load, serve until Ctrl+C; 2 if the user can mend it."""
    task = parse_app()
    try:
        from diffit.demo import serve  # loads PyTorch and Gradio, which --help does without

        serve(task)
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        fail(GRADIO)
    except ValueError as error:
        fail(str(error))
    return 0


def parse_app(argv: Sequence[str] | None = None) -> AppTask:
    """Resolve app.py's command line. Ends the program with one sentence and exit code 2 if it cannot be."""
    config: AppConfig
    arguments = given_arguments(COMMAND, argv)
    with refusing():
        config, _ = instantiate(build_parser(AppConfig, COMMAND.prog), AppConfig, arguments)
        if not 1 <= config.port <= 65535:
            raise ValueError(f"--port must be between 1 and 65535, not {config.port}")
        return AppTask(config, *find_checkpoint(config.model, config.model_path, config.image_size))
