"""Talk with a trained model: it answers an expression, and arithmetic says whether it is right."""

import contextlib
import io
import sys
from dataclasses import dataclass
from itertools import compress
from typing import TextIO

from rich.console import Console
from rich.text import Text

from trivium.config import UserError
from trivium.data.tokenizers import Tokenizer
from trivium.generate.engine import check_length, generate, longest_input
from trivium.generate.labels import read_labels
from trivium.model.base import LanguageModel
from trivium.tasks.base import Example, Step, Task, Verdict

HELP = """Type a problem, such as 99+21= or 99+21, or the beginning of one, such as 7+, which the model then completes.
  <problem> ?     the answer with the probability of each token, this once
  probabilities   show them always, or no more
  help            this text
  quit, exit      leave; so do Ctrl-C and Ctrl-D"""


@dataclass(frozen=True)
class Reply:
    """What a model made of one line. Texts are in the notation that the model reads, specials written out."""

    prompt: str
    """What the model was given."""
    generated: str
    """What it wrote, the end symbol included if it came to it."""
    tokens: list[str]
    """The same, symbol by symbol."""
    probabilities: list[float]
    """The probability that the model gave to each of them."""
    finished: bool
    """Whether it came to its end symbol."""
    readable: str
    """Prompt and generated text with every number in usual notation."""
    steps: list[Step]
    """The steps of its chain of thought, each true or false."""
    verdict: Verdict | None
    """The answer read from it, whether it is right and why not, in usual notation; None with nothing to check."""
    gap: str = ""
    """What keeps prompt and answer apart when they are shown: a blank where the answer is labels of the prompt."""


class Chat:
    """A model to put questions to. Temperature 0 is greedy; above it, each answer is a fresh sample of `seed`."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        task: Task,
        *,
        temperature: float = 0.0,
        max_new_tokens: int | None = None,
        seed: int = 0,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.task = task
        self.temperature = temperature
        self.room = longest_input(model)
        self.max_new_tokens = max_new_tokens if max_new_tokens is not None else self.room
        self.seed = seed
        # Bad settings are refused before the first question.
        generate(model, [], end_id=0, max_new_tokens=self.max_new_tokens, temperature=temperature)
        if task.labels:
            read_labels(model, [], temperature=temperature)

    def answer(self, line: str) -> Reply:
        """Let the model continue the problem in `line`, written in usual notation, and check what it wrote.

        Raises UserError for characters and shapes that the task has no place for, and for what is too long.
        """
        example = self.task.parse(line)
        tokens, probabilities, finished = self._generate(example)
        text = self.tokenizer.decode(tokens)
        gap = " " if self.task.labels else ""
        return Reply(
            prompt=example.prompt,
            generated=text,
            tokens=[self.tokenizer.decode([token]) for token in tokens],
            probabilities=probabilities,
            finished=finished,
            readable=self.task.readable(example.prompt + gap + text),
            steps=self.task.steps(example, text),
            verdict=self._check(example, text),
            gap=gap,
        )

    def _check(self, example: Example, text: str) -> Verdict | None:
        if not example.answer and not self.task.checks_half_problems:
            return None
        # Labels have no end of their own: there are as many as places.
        verdict = self.task.verify(example, text + self.task.alphabet.end if self.task.labels else text)
        answer = None if verdict.answer is None else self.task.readable(verdict.answer)
        return Verdict(verdict.correct, answer, self.task.readable(verdict.reason))

    def _generate(self, example: Example) -> tuple[list[int], list[float], bool]:
        prompt = self.tokenizer.encode(example.prompt)
        if self.task.labels:
            (read,) = read_labels(self.model, [prompt])
            assert read.probabilities is not None
            scored = [weight > 0 for weight in self.task.encode(example)[2]]
            return list(compress(read.tokens, scored)), list(compress(read.probabilities, scored)), True
        check_length(len(prompt), self.room, answer=len(self.tokenizer.encode(example.answer)))
        # Where the end symbol also stands within a prompt, one that completes a half problem ends nothing yet.
        goes_on = not example.answer and self.task.alphabet.end in example.prompt
        tokens: list[int] = []
        probabilities: list[float] = []
        while True:
            (found,) = generate(
                self.model,
                [prompt + tokens],
                end_id=self.task.alphabet.end_id,
                max_new_tokens=self.max_new_tokens - len(tokens),
                temperature=self.temperature,
                seed=self.seed,
                probabilities=True,
            )
            self.seed += 1
            tokens += found.tokens
            probabilities += found.probabilities or []
            full = len(tokens) >= self.max_new_tokens or len(prompt) + len(tokens) > self.room
            if not (goes_on and found.finished) or full:
                return tokens, probabilities, found.finished
            if self.task.verify(example, self.tokenizer.decode(tokens)).answer is not None:
                return tokens, probabilities, True


def repl(chat: Chat, console: Console, *, stdin: TextIO | None = None) -> None:
    """Read problems from `stdin` (default: the process's) and print the model's answers until it ends or Ctrl-C.

    Input that the task has no place for gets one line that says why, and the conversation goes on.
    """
    lines: TextIO = stdin or sys.stdin
    if isinstance(lines, io.TextIOWrapper):
        lines.reconfigure(errors="replace")
    interactive = lines.isatty()
    if interactive:
        console.print(HELP, markup=False, highlight=False, soft_wrap=True)
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() its history and editing keys
    always = False
    try:
        while (line := _read(lines, interactive)) is not None:
            line = line.rstrip("\r\n")
            command = line.strip().removeprefix("/")
            if command in ("quit", "exit"):
                return
            if command == "help":
                console.print(HELP, markup=False, highlight=False, soft_wrap=True)
            elif command in ("probabilities", "probs"):
                always = not always
                console.print(f"probabilities are {'shown' if always else 'hidden'} from here on", highlight=False)
            elif command:
                once = command.endswith("?") and "?" not in chat.task.alphabet.symbols
                try:
                    reply = chat.answer(line.rstrip().removesuffix("?") if once else line)
                except UserError as error:
                    console.print(Text(str(error), style="yellow"), soft_wrap=True)
                else:
                    console.print(render(reply, probabilities=always or once), soft_wrap=True)
    except KeyboardInterrupt:
        pass
    if interactive:
        console.print()


def _read(lines: TextIO, interactive: bool) -> str | None:
    if interactive:
        try:
            return input("> ")
        except EOFError:
            return None
    return lines.readline() or None


def render(reply: Reply, probabilities: bool = False) -> Text:
    """Return `reply` as lines for a terminal: the text, its steps, its answer and, if wanted, its probabilities."""
    text = Text()
    text.append(reply.prompt + reply.gap, style="dim")
    text.append(reply.generated)
    if reply.readable != reply.prompt + reply.gap + reply.generated:
        text.append(f"\n  in usual notation  {reply.readable}")
    width = max((len(step.text) for step in reply.steps), default=0)
    for number, step in enumerate(reply.steps, 1):
        text.append(f"\n  step {number}  {step.text:{width}}  ")
        text.append("true" if step.true else "false", style="green" if step.true else "bold red")
    if reply.verdict is not None:
        text.append("\n  answer  ")
        if reply.verdict.answer:
            text.append(f"{reply.verdict.answer}  ", style="bold")
        if reply.verdict.correct:
            text.append("right", style="green")
        else:
            text.append(f"wrong: {reply.verdict.reason}", style="bold red")
    if probabilities:
        for symbol, probability in zip(reply.tokens, reply.probabilities, strict=True):
            shown = "space" if symbol == " " else symbol
            text.append(f"\n  {shown:8}  {probability:8.4%}")
    return text
