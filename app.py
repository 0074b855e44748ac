"""A page on which a DiffiT checkpoint is played with in the browser: python app.py"""

import sys

from diffit.cli.app import parse_app
from diffit.cli.parser import fail


def main() -> int:
    """Parse, load, serve until Ctrl+C; 2 if the user can mend it."""
    task = parse_app()
    try:
        from diffit.demo import serve

        serve(task)
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        fail('the page needs Gradio: pip install "diffit[demo]"')
    except ValueError as error:
        fail(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
