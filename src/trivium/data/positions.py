"""Position ids of tokens in numpy, for showing data; `model.positions` computes the same inside the model.

Shapes: T tokens; any dimensions may stand in front.
"""

from collections.abc import Sequence

import numpy as np


def block_ids(tokens: np.ndarray, digit_ids: Sequence[int], closing_ids: Sequence[int] = ()) -> np.ndarray:
    """Return 1, 2, 3 ... inside each run of digits and 0 at every other token (Abacus, arXiv 2405.17399).

    One of `closing_ids` right behind a run has the id of its next digit. `tokens` is (..., T) integer ids; the result
    has its shape, int64.
    """
    is_digit = np.isin(tokens, np.asarray(digit_ids, dtype=np.int64))
    places = np.arange(1, is_digit.shape[-1] + 1)
    last_other = np.maximum.accumulate(np.where(is_digit, 0, places), axis=-1)
    ids = np.where(is_digit, places - last_other, 0)
    before = np.concatenate((np.zeros_like(ids[..., :1]), ids[..., :-1]), axis=-1)
    closes = np.isin(tokens, np.asarray(closing_ids, dtype=np.int64)) & (before > 0)
    return np.where(closes, before + 1, ids)


def token_ids(tokens: np.ndarray) -> np.ndarray:
    """Return the place 0, 1, 2 ... of each token in its sequence, as absolute position schemes count."""
    return np.broadcast_to(np.arange(tokens.shape[-1]), tokens.shape).copy()
