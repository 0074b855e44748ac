"""Measure every fast path against the plain one: python -m diffit.benchmark --cases Diffit-Fashion"""

from __future__ import annotations

import sys

from diffit.cli.benchmark import parse_benchmark
from diffit.cli.parser import fail


def main() -> int:
    """Parse, measure, print; 2 if the user can mend it, 130 if interrupted."""
    config = parse_benchmark()
    from diffit.benchmark.run import run

    try:
        run(config)
    except ValueError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
