"""Put a trained checkpoint into the package, in fp16: python tools/fashion/bundle.py runs/.../ema.safetensors

The loader computes in fp32 again. The VAE beside it was written in fp16 by train_vae.py.
"""

import argparse
from pathlib import Path

from diffit.checkpoint import load_weights, save_checkpoint
from diffit.sources import BUNDLED, find_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="an ema.safetensors that train.py wrote")
    args = parser.parse_args()
    _, config = find_checkpoint(path=args.checkpoint)
    state = load_weights(args.checkpoint, config).half().state_dict()
    save_checkpoint(BUNDLED[config.model], state, config)
    print(BUNDLED[config.model], BUNDLED[config.model].stat().st_size)


if __name__ == "__main__":
    main()
