"""Train a DiffiT: python train.py --config configs/fashion_mnist.yaml"""

import sys

from diffit.cli.parser import fail
from diffit.cli.train import parse_train
from diffit.files import as_tree


def main() -> int:
    """Parse, train, say where the weights are; 2 if the user can mend it, 75 if asked to stop, 130 if interrupted."""
    task = parse_train()
    if task.config.dry_run:
        import yaml

        from diffit.device import resolve_device
        from diffit.distributed import detect_world
        from diffit.training.estimate import report

        print(yaml.safe_dump(as_tree(task.config), sort_keys=False), end="")
        print(
            "\n".join(
                f"# {line}"
                for line in report(task.config, detect_world().size, resolve_device(task.config.device)).splitlines()
            )
        )
        return 0
    from diffit.training.loop import train
    from diffit.training.stopping import EXIT_CODE, Stopped

    try:
        path = train(task)
    except (ValueError, FileNotFoundError) as error:
        fail(str(error))
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130
    print(f"{path}  (python sample.py --model_path {path})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
