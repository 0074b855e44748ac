"""Sample images from a DiffiT checkpoint: python sample.py --model Diffit-Fashion"""

import logging
import sys

from diffit.cli.parser import fail
from diffit.cli.sample import parse_sample
from diffit.files import as_tree
from diffit.ranks import detect_world


def main() -> int:
    """Parse, sample, say where the samples are; 2 if the user can mend it, 130 if interrupted."""
    task, world = parse_sample(), detect_world()
    if task.config.dry_run:
        import yaml

        print(yaml.safe_dump(as_tree(task.config), sort_keys=False), end="")
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from diffit.sampling.generate import generate

    try:
        path = generate(task)
    except ValueError as error:
        fail(str(error))
    except KeyboardInterrupt:
        if world.is_main:
            print("\nstopped: the same command continues from here", file=sys.stderr)
        return 130
    if world.is_main:
        print(f"{path}  (pictures: {path.with_name('grid.png')})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
