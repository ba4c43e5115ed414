"""Write a tiny CLIP4Clip with random weights, and a tokenizer made of the set's training captions.

python examples/retrieval/make_model.py --set FOLDER --out FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from vidtok.data.retrieval.tokenizer import train_tokenizer
from vidtok.systems.stop import save, tiny


def make(data: Path, out: Path, prompts: str = "none", seed: int = 0) -> None:
    """A vision tower of 64 patches and 4 layers, a text tower of 2, and their files."""
    sentences = json.loads((data / "MSRVTT_data.json").read_text())["sentences"]
    train = {line.strip() for line in (data / "MSRVTT_train.9k.csv").read_text().splitlines()}
    train_tokenizer((s["caption"] for s in sentences if s["video_id"] in train), out, vocab_size=768)
    text = {"context": 24, "vocabulary": 768, "text_width": 64, "text_layers": 2, "text_heads": 4, "embed": 64}
    model = tiny(64, 8, 64, 4, 2, **text, seed=seed, temporal_prompt=prompts, max_frames=4, max_words=24)
    with torch.no_grad():
        # As large as what comes from the pixels: where a thing is, is learned in minutes.
        model.clip.visual.positional_embedding.mul_(4.0)
    save(model, out)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Write a tiny model to train.")
    parser.add_argument("--set", type=Path, required=True, help="folder that make_set.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--temporal_prompt", default="none", help="none, DGL or group2-2")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make(args.set, args.out, args.temporal_prompt, args.seed)


if __name__ == "__main__":
    main()
