"""Train a DiffiT: python train.py --config configs/fashion_mnist.yaml"""

from diffit.cli.run import train

if __name__ == "__main__":
    train()
