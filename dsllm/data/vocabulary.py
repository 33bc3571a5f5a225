"""Vocabularies trained on the run's own text, as tokenizers of the `tokenizers` library.

Both kinds keep every character, white space included, and fall back to bytes: any text decodes to itself.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence

from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dsllm.errors import DataError
from dsllm.spec.sections import BpeTokenizer, SentencePieceTokenizer

END_OF_TEXT = "<|endoftext|>"

_WHITE_SPACE_MARK = "\u2581"  # sentencepiece's stand-in for a space
_NORMAL = sentencepiece_model_pb2.ModelProto.SentencePiece.NORMAL
_RESERVED_LETTERS = "".join(sorted(set(f"<0x>0123456789ABCDEF<unk>{END_OF_TEXT}")))
_UNREACHABLE_SCORE = -1000.0  # far below the sum over the letters of the longest reserved piece, END_OF_TEXT
_SCORES_PER_NAT = 16


def train_sentencepiece(config: SentencePieceTokenizer, texts: Sequence[str]) -> bytes:
    """A sentencepiece model file; the same texts give the same bytes. Raises DataError where they do not suffice."""
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type=config.algorithm,
            vocab_size=config.vocab_size,
            byte_fallback=True,
            required_chars=_RESERVED_LETTERS if config.algorithm == "unigram" else "",
            split_digits=True,
            # Every character is kept as it is: no Unicode normalisation, no space added, none removed.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=2**30,  # a document is one "sentence"; longer ones would be dropped in silence
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=END_OF_TEXT,
            num_threads=4,  # fixed: unigram adds up floats thread by thread
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_training_problem(config.vocab_size, str(error))) from error
    return _with_plain_spaces(model.getvalue())


def _training_problem(vocab_size: int, message: str) -> str:
    """One line for the two limits that sentencepiece words as failed checks of its own source."""
    given = f"tokenizer.vocab_size: given {vocab_size}"
    if at_most := re.search(r"too high .* <= (\d+)", message):
        return _too_little_text(vocab_size, int(at_most[1]))
    if at_least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"{given}; the text's common characters alone need {at_least[1]} tokens; raise it"
    return f"{given}; sentencepiece could not be trained ({' '.join(message.split())})"


def _too_little_text(vocab_size: int, at_most: int) -> str:
    return (
        f"tokenizer.vocab_size: given {vocab_size}; the text is too short for more than {at_most} tokens; "
        f"lower it, or give more text"
    )


def _with_plain_spaces(model_file: bytes) -> bytes:
    """The model with real spaces in its pieces. By default sentencepiece writes a space as U+2581, and a text that
    holds that very character would decode to another.

    Scores of a unigram model are rounded to 1/16: sums up to a million are then exact in sentencepiece's floats and
    in doubles alike, and ties, as in a long row of dashes, break the same way everywhere.
    """
    model = sentencepiece_model_pb2.ModelProto.FromString(model_file)
    for piece in model.pieces:
        if piece.type == _NORMAL:
            piece.piece = piece.piece.replace(_WHITE_SPACE_MARK, " ")
            piece.score = round(piece.score * _SCORES_PER_NAT) / _SCORES_PER_NAT
    model.normalizer_spec.escape_whitespaces = False
    return bytes(model.SerializeToString(deterministic=True))


def fast_tokenizer(model_file: bytes) -> Tokenizer:
    """The `tokenizers` twin of a model of `train_sentencepiece`: it gives the same ids."""
    model = sentencepiece_model_pb2.ModelProto.FromString(model_file)
    is_unigram = model.trainer_spec.model_type == sentencepiece_model_pb2.TrainerSpec.UNIGRAM
    tokenizer = Tokenizer(_unigram_model(model.pieces) if is_unigram else _bpe_model(model.pieces))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _unigram_model(pieces: Sequence[sentencepiece_model_pb2.ModelProto.SentencePiece]) -> models.Unigram:
    """`tokenizers` would read reserved pieces such as `<0x41>` out of plain text, so theirs is a hopeless score, and
    the letters that spell them are always in the vocabulary."""
    scored = [(piece.piece, piece.score if piece.type == _NORMAL else _UNREACHABLE_SCORE) for piece in pieces]
    return models.Unigram(scored, unk_id=0, byte_fallback=True)


def _bpe_model(pieces: Sequence[sentencepiece_model_pb2.ModelProto.SentencePiece]) -> models.BPE:
    """sentencepiece joins any two neighbours that make a piece, the best piece first. As merges: every way to cut a
    piece in two others, the best piece first, and the better halves first among the cuts of one piece."""
    ids = {piece.piece: index for index, piece in enumerate(pieces)}
    normal = {piece.piece for piece in pieces if piece.type == _NORMAL}
    merges = []
    for piece in sorted((piece for piece in pieces if piece.type == _NORMAL), key=lambda piece: -piece.score):
        text = piece.piece
        cuts = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        halves = [(left, right) for left, right in cuts if left in normal and right in normal]
        merges += sorted(halves, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return models.BPE(ids, merges, byte_fallback=True)


def train_bpe(config: BpeTokenizer, texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE tokenizer as GPT-2's. Raises DataError where the texts do not suffice."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < config.vocab_size:
        raise DataError(_too_little_text(config.vocab_size, tokenizer.get_vocab_size()))
    return tokenizer
