"""Sample images from a DiffiT checkpoint: python sample.py --model Diffit-Fashion"""

from diffit.cli.run import imported

if __name__ == "__main__":
    raise SystemExit(imported("diffit.cli.sample:main")())
