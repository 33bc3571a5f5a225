"""The global order: which sample of the data is sample `i` of the run.

Each epoch is a fresh permutation that is never materialised. It is a small cipher on `range(num_samples)`: a Feistel
network over two digits (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002), walked until it lands inside
the range. Any position costs the same, so a resume at step 1,000,000 is as quick as at step 1.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

_ROUNDS = 6  # four already make a strong pseudo-random permutation (Luby and Rackoff, 1988)


def sample_ids(seed: int, num_samples: int, run_samples: npt.ArrayLike) -> Integers:
    """The data sample, in `range(num_samples)`, that each sample of the run reads; same shape as `run_samples`.

    Run sample `i` belongs to epoch `i // num_samples`; over an epoch every data sample is read exactly once.
    """
    assert num_samples > 0, "an order needs samples"
    epochs, positions = np.divmod(np.atleast_1d(np.asarray(run_samples, dtype=np.uint64)), np.uint64(num_samples))
    keys = _mix(_mix(np.full_like(epochs, seed)) ^ epochs)
    ids = _permute(positions, keys, num_samples)
    while (outside := ids >= np.uint64(num_samples)).any():
        ids[outside] = _permute(ids[outside], keys[outside], num_samples)
    return ids.astype(np.int64).reshape(np.shape(run_samples))


def source_seed(seed: int, label: str) -> int:
    """A seed for the order of one source of a mix, in `range(2**64)`: sources of the same size are read in orders that
    have nothing to do with each other."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {label}".encode(), digest_size=8).digest(), "little")


def _permute(values: _Words, keys: _Words, num_samples: int) -> _Words:
    """One pass of the network. Its domain is a product of two digits that is at least `num_samples` and exceeds it by
    less than its root, so that few values have to walk."""
    high_base = math.isqrt(num_samples - 1) + 1
    low_base = -(-num_samples // high_base)
    high, low = np.divmod(values, np.uint64(low_base))
    for index in range(0, _ROUNDS, 2):
        high = (high + _mix(low ^ _round_key(keys, index)) % np.uint64(high_base)) % np.uint64(high_base)
        low = (low + _mix(high ^ _round_key(keys, index + 1)) % np.uint64(low_base)) % np.uint64(low_base)
    return high * np.uint64(low_base) + low


def _round_key(keys: _Words, index: int) -> _Words:
    return _mix(keys + np.uint64(index + 1))


def _mix(words: _Words) -> _Words:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection in which every bit depends on every other."""
    words = words + np.uint64(0x9E3779B97F4A7C15)  # arrays wrap around modulo 2**64, which is what is wanted
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
