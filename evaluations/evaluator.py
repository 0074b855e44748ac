"""Score samples as ADM does: python evaluations/evaluator.py REFERENCE.npz SAMPLES.npz"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from diffit.cli.run import imported

if __name__ == "__main__":
    raise SystemExit(imported("diffit.cli.evaluate:main")())
