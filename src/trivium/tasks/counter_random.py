"""Random words that are a pure function of their counters, for whole arrays at once.

Each word is one output of splitmix64 (Steele, Lea, Flood 2014), whose finaliser mixes every bit into every other.
"""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1, _MULTIPLY_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)
_HIGH, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)


def mix(words: np.ndarray) -> np.ndarray:
    """Return the splitmix64 finaliser of uint64 `words` (a bijection); the argument is left alone."""
    mixed = words ^ (words >> _SHIFT_1)
    mixed *= _MULTIPLY_1
    mixed ^= mixed >> _SHIFT_2
    mixed *= _MULTIPLY_2
    mixed ^= mixed >> _SHIFT_3
    return mixed


def key(*counters: int) -> np.ndarray:
    """Return one uint64 word, as an array of one, that depends on all `counters` (any Python integers, in order)."""
    state = np.zeros(1, dtype=np.uint64)
    for counter in counters:
        state = mix(state + GOLDEN + np.array([counter % 2**64], dtype=np.uint64))
    return state


def words(states: np.ndarray, offset: int, count: int) -> np.ndarray:
    """Return words offset .. offset+count-1 of each stream in `states` (B,), as (count, B) uint64."""
    steps = (np.arange(offset + 1, offset + count + 1, dtype=np.uint64) * GOLDEN)[:, None]
    return mix(states + steps)


def below_high(words: np.ndarray, bound: int) -> np.ndarray:
    """Return integers uniform below `bound` <= 2^16 from the high 32 bits of each word (bias under 2^-16)."""
    return ((words >> _HIGH) * np.uint64(bound)) >> _HIGH


def below_low(words: np.ndarray, bound: int) -> np.ndarray:
    """Return integers uniform below `bound` <= 2^16 from the low 32 bits of each word, independent of the high."""
    return ((words & _LOW) * np.uint64(bound)) >> _HIGH


def unit(words: np.ndarray) -> np.ndarray:
    """Return floats uniform in [0, 1 - 2^-32] from the high 32 bits of each word."""
    return (words >> _HIGH) * 2.0**-32
