"""GPU kernels in their stand-ins: each module runs only where its stand-in is asked for (``make gpu-check``)."""

from __future__ import annotations

import os

collect_ignore = []
if not os.environ.get("VIDTOK_CUDA_MODULE"):
    collect_ignore += [
        "test_cuda_clusters.py",
        "test_cuda_host.py",
        "test_cuda_paths.py",
        "test_host_machine.py",
        "test_tile.py",
    ]
if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore += ["test_triton.py", "test_triton_paths.py"]
if not os.environ.get("VIDTOK_CUDA_MODULE") and os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore += ["test_knobs.py"]
