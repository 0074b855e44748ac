"""Train a DiffiT: python train.py --config configs/fashion_mnist.yaml"""

import sys

from diffit.config.parser import as_tree, fail
from diffit.config.train import parse_train


def main() -> int:
    """Parse, train, say where the weights are; 2 if the user can mend it, 130 if interrupted."""
    task = parse_train()
    if task.config.dry_run:
        import yaml

        print(yaml.safe_dump(as_tree(task.config), sort_keys=False), end="")
        return 0
    from diffit.training import train

    try:
        path = train(task)
    except (ValueError, FileNotFoundError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130
    print(f"{path}  (python sample.py --model_path {path})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
