"""The symbols a task writes with: token ids, digits, and the specials that end and pad."""

import re
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from trivium.registry import UserError

LARGE = 200  # symbols of an alphabet that is read by looking symbols up
SHOWN = 100  # symbols that an error lists
STAND_IN = 0xF0000  # the first code point of a plane for private use


@dataclass(frozen=True)
class Alphabet:
    """Symbols whose token id is their index; multi-character ones such as ``<end>`` are single tokens.

    `digits` lists the symbols that position schemes and traces treat as digits, least value first.
    `pad` may equal `end`.
    """

    symbols: tuple[str, ...]
    digits: tuple[str, ...] = ()
    end: str = "<end>"
    pad: str = "<end>"
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if len(set(self.symbols)) != len(self.symbols):
            raise ValueError(f"a symbol stands twice in the alphabet {self.symbols}")
        missing = [symbol for symbol in (*self.digits, self.end, self.pad) if symbol not in self.symbols]
        if missing:
            raise ValueError(f"symbols named but not in the alphabet: {missing}")
        object.__setattr__(self, "_ids", {symbol: index for index, symbol in enumerate(self.symbols)})

    def __len__(self) -> int:
        return len(self.symbols)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.symbols, key=len, reverse=True)
        return re.compile("|".join(re.escape(symbol) for symbol in longest_first))

    @property
    def end_id(self) -> int:
        return self._ids[self.end]

    @property
    def pad_id(self) -> int:
        return self._ids[self.pad]

    @property
    def digit_ids(self) -> tuple[int, ...]:
        return tuple(self._ids[digit] for digit in self.digits)

    def id_of(self, symbol: str) -> int:
        """Return the token id of one symbol; KeyError if it is not in the alphabet."""
        return self._ids[symbol]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, the longest symbol first at each place.

        Raises UserError naming the first character that is outside the alphabet.
        """
        try:
            return [self._alone[character] for character in text]
        except KeyError:
            pass
        ids, place = [], 0
        while place < len(text):
            symbol = self._symbol_at(text, place)
            if symbol is None:
                known = ["space" if symbol == " " else symbol for symbol in self.symbols[:SHOWN]]
                more = [f"... {len(self.symbols)} symbols"] if len(self.symbols) > SHOWN else []
                raise UserError(
                    f"character {text[place]!r} at place {place + 1} of {text!r} is not in the alphabet: "
                    + " ".join(known + more)
                )
            ids.append(self._ids[symbol])
            place += len(symbol)
        return ids

    def _symbol_at(self, text: str, place: int) -> str | None:
        """Return the longest symbol that `text` has at `place`."""
        if len(self.symbols) <= LARGE:
            match = self._pattern.match(text, place)
            return None if match is None else match.group()
        # A pattern tries its alternatives one by one, which thousands of them make slow.
        return next(
            (text[place : place + size] for size in self._sizes if text[place : place + size] in self._ids), None
        )

    @cached_property
    def _sizes(self) -> list[int]:
        return sorted({len(symbol) for symbol in self.symbols}, reverse=True)

    @cached_property
    def _alone(self) -> dict[str, int]:
        """The ids of characters that are symbols and begin no longer one."""
        begun = {symbol[0] for symbol in self.symbols if len(symbol) > 1}
        return {symbol: index for symbol, index in self._ids.items() if len(symbol) == 1 and symbol not in begun}

    def decode(self, ids: list[int] | np.ndarray) -> str:
        """Return the text of token ids, specials written out."""
        return "".join(map(self.symbols.__getitem__, ids.tolist() if isinstance(ids, np.ndarray) else ids))

    def decode_rows(self, ids_BT: np.ndarray, starts_B: np.ndarray, ends_B: np.ndarray) -> list[str]:
        """Return for each row what `decode` does of its token ids from place `starts_B` to before `ends_B`."""
        widest = int((ends_B - starts_B).max(initial=0))
        if not widest:
            return [""] * len(ids_BT)
        places_BT = starts_B[:, None] + np.arange(widest)
        codes_BT = self._codes[np.take_along_axis(ids_BT, np.minimum(places_BT, ids_BT.shape[1] - 1), axis=1)]
        codes_BT[places_BT >= ends_B[:, None]] = 0  # numpy's texts end where only zeros follow
        texts = codes_BT.view(f"<U{widest}")[:, 0].tolist()
        for index, symbol in enumerate(self.symbols):
            if len(symbol) > 1:
                texts = [text.replace(chr(STAND_IN + index), symbol) for text in texts]
        return texts

    @cached_property
    def _codes(self) -> np.ndarray:
        """A code point (uint32) for each id: its symbol's own, or for a longer symbol one that no text uses."""
        codes = [ord(symbol) if len(symbol) == 1 else STAND_IN + index for index, symbol in enumerate(self.symbols)]
        return np.array(codes, dtype=np.uint32)
