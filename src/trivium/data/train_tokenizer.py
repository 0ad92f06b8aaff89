"""Train a byte-pair vocabulary of GPT-2's kind on a person's own text."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trivium.data.documents import documents_of, files_in
from trivium.data.tokenizers import BytePairTokenizer
from trivium.registry import UserError
from trivium.report.storage import make_folders, naming
from trivium.tasks.byte_pairs import CONFIG_FILE, END, TOKENIZER_FILE, BytePairs
from trivium.tasks.download import require_extra

SMALLEST = 257  # every byte, and the end symbol
PIECE = 1 << 20  # characters that the trainer is handed at once


def train_tokenizer(files: Sequence[Path], size: int, folder: Path, *, key: str = "text") -> BytePairs:
    """Learn `size` tokens from the text of `files`, write the tokenizer's files to `folder`, and return the vocabulary.

    Raises UserError when the text is too short to have so many different pairs, or `folder` holds something else.
    """
    if not files:
        raise UserError("FILES: expected one or more files or folders of text, got none")
    if not SMALLEST <= size <= 1 << 20:
        raise UserError(f"--size: expected {SMALLEST} (256 bytes and the end symbol) to {1 << 20} tokens, got {size}")
    require_extra("tokenizers", "training a byte-pair vocabulary")
    strangers = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    strangers -= {TOKENIZER_FILE, CONFIG_FILE}
    if strangers:
        raise UserError(f"{folder}: holds {min(strangers)}, which is of no tokenizer; give another folder with --out")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_pieces([path for place in files for path in files_in(place)], key), trainer)
    vocabulary = BytePairs.from_tokenizers(tokenizer)
    if len(vocabulary) < size:
        raise UserError(
            f"--size: the text has pairs for {len(vocabulary)} tokens only; give more text or a smaller size"
        )
    make_folders(folder)
    with naming(folder):
        BytePairTokenizer(vocabulary).save(folder)
    return vocabulary


def _pieces(paths: Sequence[Path], key: str) -> Iterator[str]:
    empty = True
    for path in paths:
        for text in documents_of(path, key):
            empty = empty and not text
            for start in range(0, len(text), PIECE):
                yield text[start : start + PIECE]
    if empty:
        raise UserError(f"{', '.join(path.name for path in paths)}: a text of 0 tokens; give some text")
