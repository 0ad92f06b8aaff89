"""Byte-pair vocabularies for tests: a trained small one, and one of GPT-2's size that nobody trained."""

import json
from pathlib import Path
from typing import Any

TEXT = (
    "The sum of two and three is five. It's what we'll say: 12 + 34 = 46, isn't it?\n"
    "One naïve café, ünder the 漢字; the theory of the thing.\n\n    return x + 1\n"
) * 4


def trained(size: int = 320, text: str = TEXT) -> Any:
    """Return a `tokenizers.Tokenizer` of GPT-2's kind, trained on a few lines."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def write_pair(
    folder: Path, names: tuple[str, str] = ("vocab.json", "merges.txt"), size: int = 320, header: bool = True
) -> Path:
    """Write two files as GPT-2's are: bytes first, then what each merge makes, the end symbol last."""
    from trivium.tasks.byte_pairs import byte_characters

    characters = list(byte_characters().values())
    pairs = [(first, second) for first in characters for second in characters][: size - 257]
    tokens = [*characters, *(first + second for first, second in pairs), "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(json.dumps({token: index for index, token in enumerate(tokens)}), encoding="utf-8")
    lines = ["#version: 0.2"] * header + [" ".join(pair) for pair in pairs]
    (folder / names[1]).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
