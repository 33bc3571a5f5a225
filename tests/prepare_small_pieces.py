"""Started by test_prepare_kills.py: one preparation, on pieces so small that little text makes many.

python prepare_small_pieces.py CORPUS FOLDER text|jsonl
"""

from __future__ import annotations

import sys

from small_text import text_spec

from dsllm.data.preparation import join
from dsllm.data.prepare import prepare
from dsllm.data.sources import jsonl, text

if __name__ == "__main__":  # the worker processes import this file too
    text.PIECE_BYTES = jsonl.PIECE_BYTES = 20_000
    join._PIECES_BETWEEN_NOTES = 3
    corpus, folder, kind = sys.argv[1:]
    # Compressed lines are read by the process that is killed, and copies are dropped after the last piece.
    drops = "true" if kind == "jsonl" else "false"
    sources = f"data.sources=[{{kind: {kind}, path: '{corpus}', label: corpus}}]"
    spec = text_spec(corpus, sources, "data.shard_tokens=20000", f"data.drop_duplicates={drops}")
    prepare(spec, folder, processes=2)
