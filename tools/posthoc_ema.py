"""EMAs of any length after the fact, from the snapshots of a run that was trained with --ema_power.

    python tools/posthoc_ema.py runs/debug --sigma_rel 0.05 0.1 0.15
    python sample.py --model_path runs/debug/posthoc/00000060_0.15.safetensors

A length that the snapshots do not carry, by more than 1%, is refused. docs/training.md says what sigma_rel is.
"""

if __name__ == "__main__":  # above the imports, which take long: Ctrl-C is one line during them too
    from diffit.cli.run import imported

    raise SystemExit(imported("posthoc_ema:main")())

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffit.cli.run import one_sentence
from diffit.settings import Range, check_setting
from diffit.system.console import say
from diffit.training.snapshots import make_ema


@one_sentence()
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, make the EMAs, print where they are and how far off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--sigma_rel", type=float, nargs="+", required=True, help="lengths, above 0 and at most 0.28")
    parser.add_argument("--step", type=int, help="that of a snapshot (default: the last one)")
    args = parser.parse_args(argv)
    check_setting("--sigma_rel", list[float], Range(above=0, at_most=0.28), args.sigma_rel)
    for path, error in make_ema(args.run, args.sigma_rel, args.step):
        say(f"{path}  (relative error {error:.2%})")
