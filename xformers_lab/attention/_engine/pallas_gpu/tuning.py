"""How kernels are cut into blocks and compiled."""

import dataclasses

import jax.numpy as jnp

from xformers_lab.nn.platform import capability

# Products of matrices have at least so many rows and columns.
LEAST = 16
# Bytes of memory that the threads of a program share, by what the device can; newer ones have what HOPPER has.
SHARED, AMPERE, HOPPER = 99 << 10, 163 << 10, 227 << 10
OF_CAPABILITY = {8.0: AMPERE, 8.7: AMPERE, 8.6: SHARED, 8.9: SHARED, 12.0: SHARED, 12.1: SHARED}
# Of larger heads four warps' registers are too few: compiled by Triton 3.6 for a Hopper, the gradients of keys of heads
# of 128 spill 500 bytes a thread, with eight warps 16.
WIDE = 64


@dataclasses.dataclass(frozen=True)
class Tuning:
    """One kernel: queries and keys per block, powers of two from 16 on; warps of a program, and blocks that are on
    their way from memory at once."""

    block_q: int = 64
    block_k: int = 64
    warps: int = 4
    stages: int = 2


TUNING = Tuning()


@dataclasses.dataclass(frozen=True)
class Tunings:
    """The three kernels."""

    forward: Tuning = TUNING
    by_rows: Tuning = TUNING
    by_columns: Tuning = TUNING


TUNINGS = Tunings()


def fitted(tuning: Tuning, T: int, S: int, H: int, V: int, dtype: str) -> Tuning:
    """No larger blocks than there are positions, and smaller ones where those of heads of sizes H and V, resident, on
    their way and as scores, would not fit into shared memory."""
    block_q, block_k = min(tuning.block_q, power_of_two(T)), min(tuning.block_k, power_of_two(S))
    each = jnp.dtype(dtype).itemsize
    row = (power_of_two(H) + power_of_two(V)) * each

    def needed() -> int:
        return max(block_q, block_k) * (1 + tuning.stages) * row + 2 * block_q * block_k * each

    while needed() > _shared_memory() and max(block_q, block_k) > LEAST:
        block_q, block_k = min(block_q, max(block_q, block_k) // 2), min(block_k, max(block_q, block_k) // 2)
    warps = tuning.warps if max(H, V) <= WIDE else max(tuning.warps, 8)
    return Tuning(block_q, block_k, warps, tuning.stages)


def power_of_two(size: int) -> int:
    """The least that is no less, and enough for a product: blocks have such sizes."""
    return max(LEAST, 1 << (size - 1).bit_length())


def _shared_memory() -> int:
    """Without a GPU, where kernels are interpreted or only lowered, that of a Hopper."""
    return OF_CAPABILITY.get(capability() or 0, HOPPER)
