"""Started by test_prepare_kills.py: one preparation, on pieces so small that little text makes many.

python prepare_small_pieces.py CORPUS FOLDER PROCESSES
"""

from __future__ import annotations

import sys

from small_text import text_spec

from dsllm.data.preparation import join
from dsllm.data.prepare import prepare
from dsllm.data.sources import text

if __name__ == "__main__":  # the worker processes import this file too
    text.PIECE_BYTES = 20_000
    join._PIECES_BETWEEN_NOTES = 3
    corpus, folder, processes = sys.argv[1:]
    prepare(text_spec(corpus, "data.shard_tokens=20000"), folder, processes=int(processes))
