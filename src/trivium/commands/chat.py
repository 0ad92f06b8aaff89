"""trivium chat: put problems to a trained run and watch its steps being checked."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from trivium.commands.console import announce
from trivium.commands.flags import parse
from trivium.generate.chat import Chat, repl
from trivium.train.run import load


@dataclass(frozen=True)
class ChatOptions:
    run: tyro.conf.Positional[Path]
    """Run folder (one that has not finished gives its newest checkpoint), or one that `trivium export` wrote."""
    temperature: float = 0.0
    """Temperature of sampling; 0 takes the most probable token."""
    max_tokens: int | None = None
    """Most tokens of one answer (default: what the model has room for)."""
    seed: int = 0
    """Seed of sampling."""


def chat(arguments: Sequence[str]) -> None:
    """Read problems until quit, exit, Ctrl-C or Ctrl-D."""
    options = parse(ChatOptions, arguments, "trivium chat", "Give a trained run problems of your own.")
    announce(logging.WARNING)
    model, tokenizer, task = load(options.run)
    talk = Chat(
        model,
        tokenizer,
        task,
        temperature=options.temperature,
        max_new_tokens=options.max_tokens,
        seed=options.seed,
    )
    repl(talk, Console())
