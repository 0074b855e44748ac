"""Sample images from a DiffiT checkpoint: python sample.py --model Diffit-Fashion"""

import sys

from diffit.cli.run import sample

if __name__ == "__main__":
    sys.exit(sample())
