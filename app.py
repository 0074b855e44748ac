"""A page on which a DiffiT checkpoint is played with in the browser: python app.py"""

from diffit.cli.run import imported

if __name__ == "__main__":
    raise SystemExit(imported("diffit.cli.app:main")())
