"""Copies among documents are found, however the comparison is divided."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_join import piece_of

from dsllm.data.preparation import duplicates
from dsllm.data.preparation.duplicates import Copies
from dsllm.data.preparation.piece_store import save_piece


@given(st.lists(st.lists(st.sampled_from("abcdefghijklmnop"), max_size=6), max_size=6), st.integers(1, 40))
def test_the_first_of_several_alike_is_no_copy(pieces: list[list[str]], keys_at_once: int) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_KEYS_AT_ONCE", keys_at_once)
        paths = [Path(name) / f"{index}.npz" for index in range(len(pieces))]
        for path, texts in zip(paths, pieces, strict=True):
            save_piece(path, piece_of([(text, True, True) for text in texts]))
        copies = Copies(paths, Path(name) / "copies")
        found = [copies.of(index).tolist() for index in range(len(pieces))]
    everything = [text for texts in pieces for text in texts]
    expected = [text in everything[:index] for index, text in enumerate(everything)]
    assert np.concatenate([np.empty(0, bool), *found]).tolist() == expected
