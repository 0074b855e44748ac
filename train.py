"""Train a DiffiT: python train.py --config configs/fashion_mnist.yaml"""

import sys

from diffit.cli.parser import fail, refuse
from diffit.cli.train import check_data, parse_train
from diffit.files import as_tree
from diffit.ranks import detect_world


def main() -> int:
    """Parse, train, say where the weights are; 2 if the user can mend it, 75 if asked to stop, 130 if interrupted."""
    task, world = parse_train(), detect_world()
    if task.config.dry_run:
        import yaml

        from diffit.device import resolve_device
        from diffit.training.estimate import report

        try:
            cost = report(task.config, world.size, resolve_device(task.config.device))
        except ValueError as error:
            refuse(str(error))
        print(yaml.safe_dump(as_tree(task.config), sort_keys=False), end="")
        print("\n".join(f"# {line}" for line in cost.splitlines()))
        return 0
    try:
        check_data(task.config)
    except (ValueError, FileNotFoundError) as error:
        refuse(str(error))
    from diffit.training.loop import train
    from diffit.training.stopping import EXIT_CODE, Stopped

    try:
        path = train(task)
    except (ValueError, FileNotFoundError) as error:
        fail(str(error))
    except Stopped as stopped:
        if world.is_main:
            print(stopped, file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        if world.is_main:
            print("\nstopped: the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130
    if world.is_main:
        print(f"{path}  (python sample.py --model_path {path})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
