"""Sample images from a DiffiT checkpoint: python sample.py --model Diffit-Fashion"""

import logging
import sys

from diffit.config.parser import as_tree, fail
from diffit.config.sample import parse_sample


def main() -> int:
    """Parse, sample, say where the samples are; 2 if the user can mend it, 130 if interrupted."""
    task = parse_sample()
    if task.config.dry_run:
        import yaml

        print(yaml.safe_dump(as_tree(task.config), sort_keys=False), end="")
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from diffit.generation import generate

    try:
        path = generate(task)
    except ValueError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("\nstopped: the same command continues from here", file=sys.stderr)
        return 130
    print(f"{path}  (pictures: {path.with_name('grid.png')})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
