"""What the cost model knows of each GPU, and how many blocks an SM holds.

The figures are the makers' published ones for one card per SM; rates are dense, with fp32 accumulation.
A card of the same SM with fewer SMs or slower memory shares the table until ``vidtok tune`` measures it.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Gpu:
    """One GPU: sizes in bytes, rates per second, times in seconds.

    ``shared_block`` is what one block may use, ``shared_sm`` what an SM shares among its blocks;
    ``launch`` is the time that one more launch in a stream costs.
    """

    sm: int
    name: str
    sms: int
    shared_block: int
    shared_sm: int
    registers_sm: int
    threads_sm: int
    blocks_sm: int
    bandwidth: float
    fp32: float
    tensor16: float
    launch: float


GPUS: dict[int, Gpu] = {
    70: Gpu(70, "V100 SXM2", 80, 96 * KIB, 96 * KIB, 65536, 2048, 32, 0.900e12, 15.7e12, 125e12, 3.5e-6),
    80: Gpu(80, "A100 SXM", 108, 163 * KIB, 164 * KIB, 65536, 2048, 32, 1.555e12, 19.5e12, 312e12, 2.8e-6),
    86: Gpu(86, "RTX 3090", 82, 99 * KIB, 100 * KIB, 65536, 1536, 16, 0.936e12, 35.6e12, 71e12, 2.8e-6),
    89: Gpu(89, "RTX 4090", 128, 99 * KIB, 100 * KIB, 65536, 1536, 24, 1.008e12, 82.6e12, 165e12, 2.4e-6),
    90: Gpu(90, "H200 SXM", 132, 227 * KIB, 228 * KIB, 65536, 2048, 32, 4.800e12, 66.9e12, 989e12, 2.4e-6),
}


def nearest(sm: int) -> int:
    """The SM whose table serves a GPU: its own, else one that asks for no more shared memory than it has.

    Raises:
        ValueError: an SM below 70.
    """
    if sm in GPUS:
        return sm
    if sm >= 120:  # 99 KiB per block
        return 89
    known = [s for s in GPUS if s <= sm]
    if not known:
        raise ValueError(f"expected an SM of at least 70, got {sm}")
    return max(known)


def occupancy(gpu: Gpu, threads: int, registers: int, shared: int) -> tuple[int, str]:
    """How many blocks of a kernel one SM holds at once, and what limits them.

    Registers are dealt to a warp in steps of 256 from a quarter of the file each; a block's shared memory
    is rounded up to 256 bytes, and from sm_80 on the system keeps 1 KiB per block.

    Args:
        threads: per block.
        registers: per thread.
        shared: bytes per block.

    Returns:
        ``(blocks, limit)``; 0 blocks where the kernel does not fit, and then ``limit`` says what is too small.
    """
    if shared > gpu.shared_block:
        return 0, "shared memory"
    if registers > 255:
        return 0, "registers"
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    held = shared + (KIB if gpu.sm >= 80 else 0)
    limits = {
        "threads": gpu.threads_sm // (32 * warps),
        "blocks": gpu.blocks_sm,
        "registers": (gpu.registers_sm // 4 // per_warp) * 4 // warps,
        "shared memory": gpu.shared_sm // (-(-held // 256) * 256) if held else gpu.blocks_sm,
    }
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit
