"""Finite groups by name: S3, A5, Z2, Z60, and direct products such as Z2xS3."""

import itertools
import re
from dataclasses import dataclass
from functools import cache

import numpy as np

from trivium.registry import UserError

LARGEST = 1024
KNOWN = "S2 to S6, A3 to A6, Z2 to Z1024, and products of them such as Z2xS3"


@dataclass(frozen=True, eq=False)
class Group:
    """A finite group: element i is written `symbols[i]`, element 0 is the identity, and i times j is `table[i, j]`."""

    name: str
    symbols: tuple[str, ...]
    table: np.ndarray  # (order, order) int64

    @property
    def order(self) -> int:
        return len(self.symbols)


@cache
def group(name: str) -> Group:
    """Return the group called `name`; UserError that lists the known names when there is none.

    The elements of Z_n are the numbers below n, those of S_n and A_n permutations in one-line notation: (2134) sends
    1 to 2 and 2 to 1. The product of p and q does p first, then q. Elements of up to one digit are written bare, all
    others in round brackets: (1,213) is an element of Z2xS3.
    """
    factors = [_factor(part, name) for part in name.split("x")]
    words, table = factors[0]
    for more_words, more_table in factors[1:]:
        if len(words) * len(more_words) > LARGEST:
            raise UserError(f"group: {name!r} has more than {LARGEST} elements")
        # Element (i, j) of the product has the number i * n + j.
        words = [f"{one},{other}" for one in words for other in more_words]
        n = len(more_words)
        table = np.kron(table * n, np.ones((n, n), dtype=np.int64)) + np.tile(more_table, (len(table), len(table)))
    bare = all(len(word) == 1 for word in words)
    table.setflags(write=False)
    return Group(name, tuple(word if bare else f"({word})" for word in words), table)


def _factor(part: str, name: str) -> tuple[list[str], np.ndarray]:
    match = re.fullmatch(r"([SAZ])([1-9][0-9]{0,3})", part)
    if match:
        family, n = match[1], int(match[2])
        if family == "Z" and 2 <= n <= LARGEST:
            return [str(element) for element in range(n)], np.add.outer(np.arange(n), np.arange(n)) % n
        if family in "SA" and (2 if family == "S" else 3) <= n <= 6:
            return _permutations(n, even_only=family == "A")
    raise UserError(f"group: unknown group {name!r}; known: {KNOWN}")


def _permutations(n: int, even_only: bool) -> tuple[list[str], np.ndarray]:
    elements = np.array(list(itertools.permutations(range(n))), dtype=np.int64)
    if even_only:
        inversions = sum((elements[:, i] > elements[:, j]).astype(int) for i in range(n) for j in range(i + 1, n))
        elements = elements[np.asarray(inversions) % 2 == 0]
    places = n ** np.arange(n - 1, -1, -1)
    codes = elements @ places  # ascending, since the permutations come in lexicographic order
    products = elements[:, elements].transpose(1, 0, 2)  # [p, q, i] = q[p[i]]
    words = ["".join(str(image + 1) for image in element) for element in elements.tolist()]
    return words, np.searchsorted(codes, products @ places)
