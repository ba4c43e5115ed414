"""Video-text retrieval with CLIP4Clip and STOP by the options of their published scripts.

    python main.py --do_train 1 --data_path data/MSRVTT_data.json --features_path data/MSRVTT_Videos \\
        --output_dir output/tome_msrvtt --max_words 32 --max_frames 12 --batch_size 128 --lr 1e-4 --epochs 5 \\
        --tome_r 2 --tome_prop_attn --pretrained_clip_name "ViT-B/32" --sim_header meanP --temporal_prompt DGL

``vidtok train retrieval`` and ``vidtok eval retrieval`` take the same options.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; 0, 2 after one sentence about what is wrong, or 130 when stopped from the keyboard."""
    from vidtok.cli.errors import one_line
    from vidtok.cli.retrieval_options import parse

    options = parse(arguments)
    try:
        from vidtok.cli.retrieval import run

        run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"main.py: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
