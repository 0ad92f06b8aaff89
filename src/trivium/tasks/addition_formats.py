"""How sums are written: five formats in any base, as text. The arrays of `addition_arrays` write the same tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from trivium.registry import UserError
from trivium.tasks.alphabet import Alphabet
from trivium.tasks.answers import THINK, THINK_END

DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PRINTED_BITS = 12_000  # Python refuses to print numbers of more than 4,300 digits, and larger ones take it long
NOOP, END, PAD_SYMBOL = "<noop>", "<end>", "<pad>"

Format = Literal["plain", "reversed", "delimited", "column", "reversed_chain"]


def digits_of(number: int, base: int) -> list[int]:
    """Return the digits of `number`, least significant first; 0 has one."""
    if base == 10 and number.bit_length() < PRINTED_BITS:
        return [ord(character) - ord("0") for character in reversed(str(number))]
    digits = []
    while True:
        number, digit = divmod(number, base)
        digits.append(digit)
        if number == 0:
            return digits


def number_of(digits: Sequence[int], base: int) -> int:
    """Return the number whose digits, least significant first, are `digits`; high zeros are allowed."""
    number = 0
    for digit in reversed(digits):
        number = number * base + int(digit)
    return number


def columns_of(operands: Sequence[int], base: int, width: int = 0) -> list[tuple[list[int], int, int]]:
    """Return (digits, carry in, digits + carry in) of each column from the right, at least `width` columns."""
    numbers = [digits_of(operand, base) for operand in operands]
    width = max(width, *(len(number) for number in numbers))
    columns, carry = [], 0
    for place in range(width):
        digits = [number[place] if place < len(number) else 0 for number in numbers]
        total = sum(digits) + carry
        columns.append((digits, carry, total))
        carry = total // base
    return columns


@dataclass(frozen=True)
class Notation:
    """One format in one base. `width` zero-fills operands to that many digits and the answer to enough for any sum;
    `aligned` does so to the digits of the longest operand.

    Numbers are Python integers of any size; texts are as a model reads and writes them.
    """

    format: Format
    base: int
    operands: int
    width: int = 0
    separator: str = " "
    aligned: bool = False

    @property
    def has_chain(self) -> bool:
        return self.format in ("column", "reversed_chain")

    @property
    def least_first(self) -> bool:
        """Say whether the prompt and the answer are written least significant digit first."""
        return self.format in ("reversed", "delimited")

    @property
    def finish(self) -> str:
        """The symbol that ends the prompt of a complete problem."""
        return "+" if self.format == "delimited" else "="

    @cached_property
    def alphabet(self) -> Alphabet:
        digits = tuple(DIGITS[: self.base])
        if self.format == "delimited":
            return Alphabet((*digits, "+", PAD_SYMBOL), digits, end="+", pad=PAD_SYMBOL)
        symbols = (*digits, "+", "=", END)
        if self.has_chain:
            symbols += (THINK, THINK_END, NOOP, self.separator)
        return Alphabet(symbols, digits)

    def answer_width(self, width: int) -> int:
        """Return the number of digits of the largest sum of operands that have `width` digits."""
        return len(digits_of(self.operands * (self.base**width - 1), self.base))

    def write_number(self, number: int, width: int = 0, least_first: bool = False) -> str:
        """Return `number` in this base, zero-filled to `width` digits."""
        text = "".join(DIGITS[digit] for digit in digits_of(number, self.base)).ljust(width, "0")
        return text if least_first else text[::-1]

    def read_number(self, text: str, least_first: bool = False) -> int:
        """Return the number that `text` writes; ValueError unless it is one or more digits of this base."""
        digits = [DIGITS[: self.base].index(character) for character in text]
        if not digits:
            raise ValueError("no digits")
        return number_of(digits if least_first else digits[::-1], self.base)

    def _operand_width(self, operands: Sequence[int]) -> int:
        """Return the width of zero-filled operands: longer ones than the format was made for widen all."""
        if not self.width and not self.aligned:
            return 0
        return max(self.width, *(len(digits_of(operand, self.base)) for operand in operands))

    def _sum(self, operands: Sequence[int], least_first: bool) -> str:
        width = self._operand_width(operands)
        return self.write_number(sum(operands), self.answer_width(width) if width else 0, least_first)

    def write_prompt(self, operands: Sequence[int]) -> str:
        """Return everything that is given of a complete problem."""
        width = self._operand_width(operands)
        body = "+".join(self.write_number(operand, width, self.least_first) for operand in operands)
        return f"+{body}+" if self.format == "delimited" else f"{body}="

    def write_chain(self, operands: Sequence[int]) -> str:
        """Return the chain of thought with its brackets, or nothing where the format writes none."""
        width = self._operand_width(operands)
        if self.format == "reversed_chain":
            body = "+".join(self.write_number(operand, width, least_first=True) for operand in operands)
            return f"{THINK}{body}={self._sum(operands, least_first=True)}{THINK_END}"
        columns = columns_of(operands, self.base, width) if self.format == "column" else []
        if len(columns) < 2:
            return ""
        terms = []
        for digits, carry, total in columns:
            parts = [*digits, carry] if carry else digits
            terms.append("+".join(map(self.write_number, parts)) + "=" + self.write_number(total))
        return THINK + self.separator.join(terms) + THINK_END

    def write_answer(self, operands: Sequence[int]) -> str:
        """Return everything that is wanted after the prompt: chain, sum and end symbol."""
        return self.write_chain(operands) + self._sum(operands, self.least_first) + self.alphabet.end

    def read_prompt(self, prompt: str) -> tuple[list[int], bool]:
        """Return (operands, whether the prompt is complete) of a prompt in this format.

        Raises ValueError when it is not of the format's shape.
        """
        if self.format == "delimited":
            if not prompt.startswith("+"):
                raise ValueError("a delimited problem starts with +")
            parts = prompt[1:].split("+")
            complete = len(parts) == self.operands + 1 and parts[-1] == ""
        else:
            parts = prompt.removesuffix("=").split("+")
            complete = len(parts) == self.operands and parts[-1] != "" and prompt.endswith("=")
        if parts[-1] == "":
            parts.pop()
        if len(parts) > self.operands or (prompt.endswith("=") and not complete):
            raise ValueError(f"{len(parts)} operands")
        return [self.read_number(part, self.least_first) for part in parts], complete

    def parse(self, expression: str) -> tuple[str, list[int] | None]:
        """Return (prompt, operands or None for a half expression) of a sum in normal notation, such as `99+21`.

        Normal notation is most significant digit first, in this base. Raises UserError on foreign characters, an
        operand without digits, or a number of operands that the format does not have.
        """
        shape = f"write a sum of {self.operands} numbers in base {self.base}, digits {self.digit_range}"
        for place, character in enumerate(expression, start=1):
            # Upper case of some foreign letters is an ASCII letter, or two of them.
            if not character.isascii() or character.upper() not in DIGITS[: self.base] + "+= ":
                raise UserError(f"character {character!r} at place {place} of {expression!r}: {shape}")
        typed = expression.replace(" ", "").upper()
        body, equals, rest = typed.partition("=")
        if rest:
            raise UserError(f"{expression!r}: nothing may follow the =; {shape}")
        *closed, last = body.split("+")
        given = len(closed) + (last != "")
        if "" in closed or given == 0 or (equals and last == ""):
            raise UserError(f"{expression!r}: a number is missing; {shape}")
        if len(closed) >= self.operands or (equals and given != self.operands):
            raise UserError(f"{expression!r} has {given} numbers; {shape}")
        if given == self.operands:
            operands = [self.read_number(number) for number in (*closed, last)]
            return self.write_prompt(operands), operands
        # A number that a + follows is finished, and written as the model saw finished numbers; the last one is not.
        texts = [self.write_number(self.read_number(number), self.width, self.least_first) for number in closed]
        texts.append(self.write_number(self.read_number(last), 0, self.least_first) if last else "")
        return ("+" if self.format == "delimited" else "") + "+".join(texts), None

    @property
    def digit_range(self) -> str:
        """The digits of this base in words, such as 0-9A-F."""
        return (
            f"0-{self.base - 1}"
            if self.base <= 10
            else "0-9" + ("A" if self.base == 11 else f"A-{DIGITS[self.base - 1]}")
        )
