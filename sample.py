"""Sample images from a DiffiT checkpoint: python sample.py --model Diffit-Fashion"""

from diffit.cli.run import sample

if __name__ == "__main__":
    sample()
