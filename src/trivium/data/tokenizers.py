"""Tokenizers: text to token ids and back, in files that the `tokenizers` and `transformers` libraries load too."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trivium.config import UserError, unreadable
from trivium.tasks.alphabet import Alphabet
from trivium.tasks.byte_pairs import CONFIG_FILE, TOKENIZER_FILE, BytePairs, Vocabulary, read_folder, to_characters
from trivium.tasks.download import require_extra


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
            "padding_side": "left",  # what `generate` of transformers wants
            "clean_up_tokenization_spaces": False,
            "trivium_digits": list(self.alphabet.digits),
        }


@dataclass(frozen=True)
class BytePairTokenizer:
    """GPT-2's byte pairs, or a vocabulary trained like them."""

    alphabet: BytePairs

    def __len__(self) -> int:
        return len(self.alphabet)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`; the name of a special token in it is that token."""
        return self.alphabet.encode(text)

    def decode(self, ids: list[int] | np.ndarray) -> str:
        """Return the text of token ids, specials written out; bytes that are not UTF-8 become U+FFFD."""
        return self.alphabet.decode(ids)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json to `folder`, which must exist."""
        require_extra("tokenizers", "writing a byte-pair tokenizer")
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        alphabet = self.alphabet
        vocabulary = {to_characters(token): index for token, index in alphabet.ids.items()} | dict(alphabet.specials)
        merges = [(to_characters(left), to_characters(right)) for left, right in alphabet.merges]
        written = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        written.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
        written.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
        written.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in alphabet.specials])
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": alphabet.end,
            "eos_token": alphabet.end,
            "pad_token": alphabet.pad,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        }
        for name, text in ((TOKENIZER_FILE, written.to_str(pretty=True)), (CONFIG_FILE, json.dumps(config, indent=2))):
            (Path(folder) / name).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "BytePairTokenizer":
        """Return the tokenizer whose files lie in `folder`; UserError when they are not there or of another kind."""
        return cls(read_folder(Path(folder)))


Tokenizer = CharacterTokenizer | BytePairTokenizer


def tokenizer_of(vocabulary: Vocabulary) -> Tokenizer:
    """Return the tokenizer of a task's alphabet or byte pairs."""
    return BytePairTokenizer(vocabulary) if isinstance(vocabulary, BytePairs) else CharacterTokenizer(vocabulary)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Return the tokenizer that `save` wrote to `folder`; UserError when its files are missing or of another kind."""
    described = _read_json(Path(folder) / TOKENIZER_FILE)
    model = described.get("model") if isinstance(described, dict) else None
    pairs = isinstance(model, dict) and model.get("type") == "BPE"
    return (BytePairTokenizer if pairs else CharacterTokenizer).load(folder)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
