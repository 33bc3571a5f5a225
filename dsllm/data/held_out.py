"""Which documents are held out for validation: a rule on a document's whole text, so that an exact copy of a held-out
document is held out too, on any machine and wherever it lies."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from dsllm.errors import DataError

_KEYS = 2**64


def key_number(key: bytes) -> int:
    """A number below 2**64 that depends on the document's text alone."""
    return int.from_bytes(key[:8], "little")


def are_held_out(keys: npt.NDArray[np.uint8], threshold: int) -> npt.NDArray[np.bool_]:
    """Which of the documents with these keys, (documents, KEY_BYTES), are held out; (documents,)."""
    numbers = np.ascontiguousarray(keys[:, :8]).view("<u8")[:, 0]
    held_out: npt.NDArray[np.bool_] = numbers < np.uint64(threshold)
    return held_out


def validation_threshold(fraction: float, keys: Iterable[bytes]) -> int:
    """Documents whose `key_number` is below this number are held out; 0 where `fraction` is.

    It is the fraction of all keys, moved just enough that little text gives each split a document. Takes `keys` only
    until both splits have one. DataError where there are not two unlike documents to share out.
    """
    if fraction == 0:
        return 0
    threshold = int(fraction * _KEYS)
    lowest, highest = _KEYS, -1
    for number in map(key_number, keys):
        lowest, highest = min(lowest, number), max(highest, number)
        if lowest < threshold <= highest:
            return threshold
    if highest < 0:
        return threshold  # no document at all, which is told elsewhere
    if lowest == highest:
        raise DataError(
            "data.sources: given 1 document; one must be trained on and another held out for validation; "
            "split the text into several files, or name data.validation_sources and set data.validation_fraction to 0"
        )
    return lowest + 1 if lowest >= threshold else highest
