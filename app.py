"""A page on which a DiffiT checkpoint is played with in the browser: python app.py"""

import sys

from diffit.cli.run import app

if __name__ == "__main__":
    sys.exit(app())
