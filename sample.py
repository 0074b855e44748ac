"""Sample images from a DiffiT checkpoint: python sample.py --model Diffit-Fashion"""

import sys

from diffit.cli.sample import main

if __name__ == "__main__":
    sys.exit(main())
