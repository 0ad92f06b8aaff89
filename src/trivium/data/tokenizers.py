"""Tokenizers: text to token ids and back, in files that the `tokenizers` and `transformers` libraries load too."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trivium.config import UserError, unreadable
from trivium.tasks.alphabet import Alphabet

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"


@dataclass(frozen=True)
class CharacterTokenizer:
    """One token for each symbol of a task's alphabet; specials such as `<end>` are one token of several characters."""

    alphabet: Alphabet

    def __len__(self) -> int:
        return len(self.alphabet)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`; UserError names the first character outside the alphabet."""
        return self.alphabet.encode(text)

    def decode(self, ids: list[int] | np.ndarray) -> str:
        """Return the text of token ids, specials written out."""
        return self.alphabet.decode(ids)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json to `folder`, which must exist."""
        for name, content in ((TOKENIZER_FILE, self._tokenizer_json()), (CONFIG_FILE, self._config_json())):
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (Path(folder) / name).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "CharacterTokenizer":
        """Return the tokenizer that `save` wrote to `folder`; UserError when its files are not there or not its."""
        tokenizer = _read_json(Path(folder) / TOKENIZER_FILE)
        config = _read_json(Path(folder) / CONFIG_FILE)
        try:
            vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
            symbols = tuple(sorted(vocabulary, key=lambda symbol: vocabulary[symbol]))
            if [vocabulary[symbol] for symbol in symbols] != list(range(len(symbols))):
                raise ValueError("ids are not 0, 1, 2 ...")
            digits = tuple(config["trivium_digits"])
            return cls(Alphabet(symbols, digits, end=config["eos_token"], pad=config["pad_token"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder}: its tokenizer was not written by Trivium ({error})") from None

    def _tokenizer_json(self) -> dict[str, Any]:
        alphabet = self.alphabet
        special = [symbol for symbol in alphabet.symbols if len(symbol) > 1 or symbol in (alphabet.end, alphabet.pad)]
        added = [
            {
                "id": alphabet.id_of(symbol),
                "content": symbol,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for symbol in special
        ]
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            # One token a character, spaces and line breaks too; longer symbols are matched before this runs.
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": r"[\s\S]"},
                "behavior": "Isolated",
                "invert": False,
            },
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            # The unknown token is not in the vocabulary: so the library refuses foreign characters, as `encode` does.
            "model": {
                "type": "WordLevel",
                "vocab": {symbol: index for index, symbol in enumerate(alphabet.symbols)},
                "unk_token": "<unknown>",
            },
        }

    def _config_json(self) -> dict[str, Any]:
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.alphabet.end,
            "pad_token": self.alphabet.pad,
            "padding_side": "right",
            "clean_up_tokenization_spaces": False,
            "trivium_digits": list(self.alphabet.digits),
        }


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
