"""One allocator setting for every side of a comparison.

Fresh pages cost up to fifteen times what writing them costs, and which side pays depends on what
glibc happens to keep mapped. So nothing is ever given back: no mmap, no trimming, one large heap.
"""

from __future__ import annotations

import ctypes

import psutil
import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_memory(pretouch_gib: float = 3.0) -> bool:
    """Make freed memory stay mapped, and map some; False where the C library has no mallopt."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    done = all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1), mallopt(M_TOP_PAD, 1 << 28)])
    available = psutil.virtual_memory().available / 2**30
    torch.zeros(int(min(pretouch_gib, available / 4) * 2**28))
    return done
