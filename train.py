"""Train a DiffiT: python train.py --config configs/fashion_mnist.yaml"""

from diffit.cli.run import imported

if __name__ == "__main__":
    raise SystemExit(imported("diffit.cli.train:main")())
