"""What tasks of word problems share: solutions that annotate their steps and end with `#### n`, as GSM8K's do."""

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from trivium.registry import UserError
from trivium.tasks.answers import strip_end
from trivium.tasks.base import ANSWER, CHAIN, PAD, PROMPT, Batch, Example, Split, Step, Task, Verdict
from trivium.tasks.calculator import annotations, holds

SIGN = "####"
# GSM8K's own expression for the number; commas, a currency sign and a last dot do not count.
_STRICT = re.compile(r"####\s*\$?(-?[0-9.,]+)")

# The two rules under which GSM8K is reported elsewhere: the first number behind ####, and the last of any number.
_FIRST = re.compile(r"#### (\-?[0-9\.\,]+)")
_ANY = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_ASIDE = re.compile(r"(?s)[,$]|.*#### |\.$")


def strict_number(text: str) -> str | None:
    """Return the number behind the first `#### `, as the strict rule of GSM8K reads it; None without one."""
    found = _FIRST.search(text)
    return (plain_number(found[1]) or None) if found else None


def flexible_number(text: str) -> str | None:
    """Return the last number of `text` wherever it stands, as the flexible rule reads it; None without one."""
    found = _ANY.findall(text)
    return (plain_number(found[-1]) or None) if found else None


def plain_number(text: str) -> str:
    """Return a number as it is compared: without commas, $, what stands before `#### `, and a final dot."""
    return _ASIDE.sub("", text)


def number_of(text: str) -> str | None:
    """Return the number behind the last `####` of a solution, without commas, $ and a final dot; None without one."""
    found = _STRICT.findall(text)
    if not found:
        return None
    return found[-1].replace(",", "").removesuffix(".") or None


class WordTask(Task):
    """A finite task of word problems. The solution is CHAIN, the number behind `#### ` and the end symbol ANSWER."""

    @abstractmethod
    def problems(self, split: Split) -> list[Example]:
        """Return the problems of `split`; UserError when the task has none."""

    def size(self, split: Split) -> int | None:
        return len(self.problems(split))

    def example(self, split: Split, index: int, stage: int = 0) -> Example:
        problems = self.problems(split)
        if not 0 <= index < len(problems):
            raise IndexError(f"the {split} split has {len(problems)} problems, there is no number {index}")
        return problems[index]

    @cached_property
    def _collated(self) -> dict[Split, Batch]:
        return {}

    def gather(self, split: Split, indices: np.ndarray, stage: int = 0) -> Batch:
        problems = self.problems(split)
        if split not in self._collated:
            whole = self.collate(problems)
            longest = int(whole.lengths_B.max()) + 1
            if longest > self.max_length:
                raise UserError(f"max_length: {self.max_length} is given, a {split} problem has {longest} tokens")
            self._collated[split] = whole
        rows = np.asarray(indices, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(problems)):
            raise IndexError(f"the {split} split has {len(problems)} problems, not {rows.min()} to {rows.max()}")
        return self._collated[split].take(rows)

    def tokens_of(self, example: Example) -> int:
        """Return the tokens of a problem with its solution, the end symbol included."""
        return len(self.alphabet.encode(example.prompt)) + len(self.alphabet.encode(example.answer))

    def regions(self, example: Example) -> list[int]:
        ids = np.array(self.alphabet.encode(example.answer), dtype=np.int64)
        return [PROMPT] * len(self.alphabet.encode(example.prompt)) + self._regions(example.answer, ids).tolist()

    def _regions(self, answer: str, ids_A: np.ndarray) -> np.ndarray:
        """Return CHAIN or ANSWER for each token of a solution."""
        number = len(answer[: answer.rfind(f"{SIGN} ") + len(SIGN) + 1].encode())
        # In bytes, since a token may be part of a character.
        return np.where(np.cumsum(self._symbol_bytes[ids_A]) > number, ANSWER, CHAIN)

    @cached_property
    def _symbol_bytes(self) -> np.ndarray:
        """How many bytes each symbol is."""
        return np.array([_num_bytes(self.alphabet, index) for index in range(len(self.alphabet))])

    def collate(self, examples: Sequence[Example]) -> Batch:
        # Each text is encoded once: a run reads all of its training problems before the first step.
        pairs = [
            [np.array(self.alphabet.encode(text), dtype=np.int64) for text in (example.prompt, example.answer)]
            for example in examples
        ]
        prompts_B, answers_B = (np.array([len(pair[side]) for pair in pairs], dtype=np.int64) for side in (0, 1))
        lengths_B = prompts_B + answers_B - 1
        place_T = np.arange(int(lengths_B.max(initial=0)) + 1)
        ids_BT = np.full((len(pairs), len(place_T)), self.alphabet.pad_id, dtype=np.int64)
        ids_BT[place_T <= lengths_B[:, None]] = np.concatenate(
            [np.zeros(0, np.int64), *(x for pair in pairs for x in pair)]
        )
        regions_BT = np.full(ids_BT.shape, PAD, dtype=np.uint8)
        regions_BT[place_T < prompts_B[:, None]] = PROMPT
        solutions = [self._regions(example.answer, pair[1]) for example, pair in zip(examples, pairs, strict=True)]
        behind_BT = (place_T >= prompts_B[:, None]) & (place_T <= lengths_B[:, None])
        regions_BT[behind_BT] = np.concatenate([np.zeros(0, np.uint8), *solutions])
        tokens_BT = np.where(place_T < lengths_B[:, None], ids_BT, self.alphabet.pad_id)[:, :-1]
        scored_BT = np.isin(regions_BT[:, 1:], (CHAIN, ANSWER)).astype(np.float32)
        return Batch(tokens_BT, ids_BT[:, 1:].copy(), scored_BT, regions_BT[:, 1:].copy(), lengths_B, prompts_B)

    def verify(self, example: Example, text: str) -> Verdict:
        """Decide whether the number behind the last `####` of `text` is right; the end symbol has to follow it."""
        body, ended = strip_end(self.alphabet, text.removeprefix(example.prompt))
        given, wanted = number_of(body), number_of(example.answer)
        if given is None:
            return Verdict(False, None, f"there is no {SIGN} line with a number")
        if not ended:
            return Verdict(False, given, "the answer does not end")
        return Verdict(given == wanted, given, "" if given == wanted else f"{wanted} is right")

    def readings(self, example: Example, text: str) -> dict[str, Verdict]:
        """Return the verdicts of GSM8K's strict and flexible rules, which do not ask for an end symbol."""
        body = strip_end(self.alphabet, text.removeprefix(example.prompt))[0]
        wanted = strict_number(example.answer)
        found = {"strict": strict_number(body), "flexible": flexible_number(body)}
        return {name: Verdict(given == wanted, given) for name, given in found.items()}

    def known_problems(self) -> list[Example]:
        """Return the problems among whose answers the constant one is the most frequent: those of training."""
        return self.problems("train")

    def constant_answer(self) -> str | None:
        counts = Counter(strict_number(example.answer) for example in self.known_problems())
        (number, _), *_ = counts.most_common(1)
        return f"{SIGN} {number}{self.alphabet.end}"

    def steps(self, example: Example, text: str) -> list[Step]:
        return [Step(f"<<{left}={right}>>", holds(left, right)) for left, right in annotations(text)]

    def answer_from_steps(self, example: Example, text: str) -> str | None:
        found = annotations(text)
        return found[-1][1] if found else None


def _num_bytes(alphabet: object, index: int) -> int:
    token_bytes = getattr(alphabet, "token_bytes", None)
    if token_bytes is not None:
        return len(token_bytes(index))
    symbols: tuple[str, ...] = alphabet.symbols  # pyright: ignore[reportAttributeAccessIssue]
    return len(symbols[index].encode())
