import contextlib
import io
import os
import pty
import select
import signal
import textwrap

import pytest
import torch
from rich.console import Console

from tests.scripted import ScriptedModel, solver
from trivium.config import UserError
from trivium.data.tokenizers import CharacterTokenizer
from trivium.generate.chat import Chat, repl
from trivium.tasks.addition import AdditionConfig
from trivium.tasks.answers import THINK_END
from trivium.tasks.base import Step
from trivium.tasks.jsonl import JsonlConfig


def right(example, written):
    return example.answer


def chat_of(format="plain", write=right, max_length=None, **settings):
    options = {key: settings.pop(key) for key in ("base", "operands", "max_digits") if key in settings}
    task = AdditionConfig(format=format, **options).build()
    return Chat(solver(task, write, max_length), CharacterTokenizer(task.alphabet), task, **settings)


def talk(chat, typed):
    """Return what the conversation prints when `typed` is piped in."""
    printed = io.StringIO()
    repl(chat, Console(file=printed, width=100), stdin=io.StringIO(typed))
    return printed.getvalue()


@pytest.mark.parametrize("line", ["99+21=", "99+21", " 99 + 21 = "])
def test_a_sum_may_be_typed_with_or_without_its_equals_sign(line):
    reply = chat_of().answer(line)
    assert (reply.prompt, reply.generated, reply.finished) == ("99+21=", "120<end>", True)
    assert (reply.verdict.correct, reply.verdict.answer, reply.steps) == (True, "120", [])


def test_each_token_comes_with_its_probability():
    reply = chat_of("column").answer("12+34")
    assert "".join(reply.tokens) == reply.generated == "<think>2+4=6 1+3=4</think>46<end>"
    assert reply.probabilities == pytest.approx([1] * len(reply.tokens))


def test_the_chain_is_shown_step_by_step_and_each_is_judged():
    def one_false_step(example, written):
        return "<think>9+1=10 9+2+1=13</think>130<end>"

    reply = chat_of("column", one_false_step).answer("99+21")
    assert reply.steps == [Step("9+1=10", True), Step("9+2+1=13", False)]
    assert (reply.verdict.correct, reply.verdict.answer, reply.verdict.reason) == (False, "130", "120 is right")
    printed = talk(chat_of("column", one_false_step), "99+21\n")
    assert "9+1=10    true" in printed
    assert "9+2+1=13  false" in printed
    assert "130  wrong: 120 is right" in printed


@pytest.mark.parametrize(
    ("format", "raw", "usual"),
    [("reversed", "99+12=021<end>", "99+21=120<end>"), ("delimited", "+99+12+021+", "+99+21+120+")],
)
def test_reversed_numbers_are_shown_in_usual_notation_too(format, raw, usual):
    reply = chat_of(format).answer("99+21=")
    assert (reply.prompt + reply.generated, reply.readable, reply.verdict.answer) == (raw, usual, "120")
    printed = talk(chat_of(format), "99+21\n")
    assert raw in printed
    assert usual in printed
    assert "answer  120  right" in printed


def test_a_wrong_reversed_answer_is_corrected_in_usual_notation():
    reply = chat_of("reversed", lambda example, _: "031<end>").answer("99+21=")
    assert (reply.verdict.answer, reply.verdict.reason) == ("130", "120 is right")


@pytest.mark.parametrize(
    ("format", "whole"),
    [
        ("plain", "7+1=8<end>"),
        ("reversed", "7+1=8<end>"),
        ("delimited", "+7+1+8+"),
        ("column", "7+1=8<end>"),
        ("reversed_chain", "7+1=<think>7+1=8</think>8<end>"),
    ],
)
def test_a_half_expression_is_completed_by_the_model_and_then_checked(format, whole):
    reply = chat_of(format).answer("7+")
    assert reply.prompt + reply.generated == whole
    assert (reply.verdict.correct, reply.verdict.answer, reply.finished) == (True, "8", True)
    wrong = chat_of(format, lambda example, _: example.answer.replace("8", "9")).answer("7")
    assert (wrong.verdict.correct, wrong.verdict.answer) == (False, "9")


def test_a_half_expression_that_is_never_completed_is_not_right():
    task = AdditionConfig(format="delimited").build()
    model = ScriptedModel(lambda history: task.alphabet.end_id, len(task.alphabet), task.max_length)
    reply = Chat(model, CharacterTokenizer(task.alphabet), task).answer("7+")
    assert not reply.verdict.correct
    assert len(reply.prompt + reply.generated) == task.max_length + 1


def test_an_equals_sign_after_half_an_expression_does_not_complete_it():
    task = AdditionConfig(format="plain").build()
    writes = task.alphabet.encode("7+=7<end>")
    model = ScriptedModel(lambda history: writes[len(history)], len(task.alphabet), task.max_length)
    reply = Chat(model, CharacterTokenizer(task.alphabet), task).answer("7+")
    assert reply.generated == "=7<end>"
    assert (reply.verdict.correct, reply.verdict.reason) == (False, "'7+=' is not a problem")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("99*21", r"character '\*' at place 3"),
        ("99+21=120", "nothing may follow the ="),
        ("1+2+3", "3 numbers"),
        ("neunundneunzig", "character 'n'"),
        ("٣+٤", "character"),
        ("123456789012345+1=", "too long for the model: 18 tokens, the model reads at most 13"),
        ("1234+1234=", "too long for the model: 10 tokens and 5 of its answer, the model reads at most 13"),
    ],
)
def test_what_the_model_cannot_read_is_explained_in_one_line_and_the_talk_goes_on(line, message):
    with pytest.raises(UserError, match=message) as caught:
        chat_of().answer(line)
    assert "\n" not in str(caught.value)
    printed = talk(chat_of(), f"{line}\n1+2\n")
    first, *rest = printed.splitlines()
    assert first == str(caught.value)
    assert rest == ["1+2=3<end>", "  answer  3  right"]


@pytest.mark.parametrize("leave", ["quit", "exit", "/quit", " exit "])
def test_quit_and_exit_end_the_talk(leave):
    assert talk(chat_of(), f"1+2\n{leave}\n5+5\n").splitlines() == ["1+2=3<end>", "  answer  3  right"]


def test_the_talk_ends_with_its_input_even_in_the_middle_of_a_line():
    assert "5+5=10<end>" in talk(chat_of(), "\n  \n5+5")
    assert talk(chat_of(), "") == ""


def test_ctrl_c_ends_the_talk_without_a_traceback():
    class Interrupted(io.StringIO):
        def readline(self, size=-1):
            raise KeyboardInterrupt

    repl(chat_of(), Console(file=io.StringIO()), stdin=Interrupted())


def test_probabilities_are_shown_on_demand_once_or_from_then_on():
    shown = ["  3         100.0000%", "  <end>     100.0000%"]
    assert not set(shown) & set(talk(chat_of(), "1+2\n").splitlines())
    assert talk(chat_of(), "1+2 ?\n1+2\n").splitlines()[2:] == [*shown, "1+2=3<end>", "  answer  3  right"]
    always = talk(chat_of(), "probabilities\n1+2\n1+2\nprobabilities\n1+2\n").splitlines()
    assert always.count(shown[0]) == 2
    assert always[-1] == "  answer  3  right"


def test_a_space_token_is_named_where_probabilities_are_shown():
    assert "\n  space     100" in talk(chat_of("column"), "12+34?\n")


def test_help_names_every_command():
    printed = talk(chat_of(), "help\n")
    for word in ("99+21=", "7+", "?", "probabilities", "quit", "exit", "Ctrl-C", "Ctrl-D"):
        assert word in printed


def test_the_token_limit_cuts_an_answer_which_is_then_wrong():
    reply = chat_of(max_new_tokens=2).answer("99+21")
    assert (reply.generated, reply.finished, reply.verdict.correct) == ("12", False, False)
    assert reply.verdict.reason == "the answer does not end"


def test_a_chain_that_was_cut_shows_its_steps():
    reply = chat_of("column", max_new_tokens=9).answer("99+21")
    assert reply.generated == "<think>9+1=10 9"
    assert reply.steps[0] == Step("9+1=10", True)
    assert not reply.verdict.correct


def test_impossible_settings_are_refused_before_the_first_question():
    for settings in ({"temperature": -1.0}, {"max_new_tokens": 0}):
        with pytest.raises(UserError, match=next(iter(settings))):
            chat_of(**settings)


def test_samples_differ_from_question_to_question_and_repeat_with_the_seed():
    task = AdditionConfig(format="plain").build()
    model = ScriptedModel(lambda history: torch.zeros(len(task.alphabet)), len(task.alphabet), task.max_length)

    def ask(seed):
        chat = Chat(model, CharacterTokenizer(task.alphabet), task, temperature=1.0, seed=seed)
        return [chat.answer("1+2").generated for _ in range(6)]

    assert len(set(ask(0))) > 3
    assert ask(0) == ask(0) != ask(100)


def test_other_bases_and_more_numbers_are_read_as_the_task_has_them():
    reply = chat_of("column", base=16, operands=3).answer("ff+1+1")
    assert (reply.prompt, reply.verdict.answer, reply.verdict.correct) == ("FF+1+1=", "101", True)
    assert [step.true for step in reply.steps] == [True, True]
    assert THINK_END in reply.generated


def test_a_task_without_arithmetic_shows_the_text_and_judges_nothing(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "up? ", "answer": "down"}\n', encoding="utf-8")
    task = JsonlConfig(train=tmp_path / "train.jsonl").build()
    model = ScriptedModel(lambda history: task.alphabet.end_id, len(task.alphabet), task.max_length)
    chat = Chat(model, CharacterTokenizer(task.alphabet), task)
    assert chat.answer("up? ").verdict is None
    # A question mark that the task writes with is a part of the question.
    assert talk(chat, "up?\n").splitlines() == ["up?<end>"]
    assert "character 'x'" in talk(chat, "xup\n")


SCRIPT = """
    import sys
    from rich.console import Console
    from tests.scripted import solver
    from trivium.data.tokenizers import CharacterTokenizer
    from trivium.generate.chat import Chat, repl
    from trivium.tasks.addition import AdditionConfig
    task = AdditionConfig(format="column").build()
    model = solver(task, lambda example, written: example.answer)
    repl(Chat(model, CharacterTokenizer(task.alphabet), task), Console())
"""


def test_a_pipe_drives_the_talk_to_a_clean_end(warm):
    # What comes through the pipe has all been written when the talk begins.
    pipe = """
import os, sys
ours, theirs = os.pipe()
os.write(theirs, b"99+21=\\n\\xff\\xfe\\n7+\\n")
os.close(theirs)
os.dup2(ours, 0)
sys.stdin = open(0, closefd=False)
"""
    process = warm.start(pipe + textwrap.dedent(SCRIPT))
    assert (process.wait(), process.err) == (0, "")
    lines = process.out.splitlines()
    assert lines[0] == "99+21=<think>9+1=10 9+2+1=12</think>120<end>"
    assert lines[4].startswith("character '\N{REPLACEMENT CHARACTER}'")
    assert lines[5:] == ["7+1=8<end>", "  answer  8  right"]


@pytest.mark.parametrize("key", [b"\x03", b"\x04"], ids=["Ctrl-C", "Ctrl-D"])
def test_in_a_terminal_a_key_leaves_without_a_traceback(key, warm):
    ours, theirs = pty.openpty()
    # In a session of its own the process can take the terminal, so that Ctrl-C in it becomes a signal. A shell's
    # background job, such as a test run in one, begins with Ctrl-C ignored, and its children inherit that.
    terminal = f"""
import os, signal, sys
os.setsid()
terminal = os.open({os.ttyname(theirs)!r}, os.O_RDWR)
for number in range(3):
    os.dup2(terminal, number)
sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", buffering=1, closefd=False)
sys.stderr = open(2, "w", buffering=1, closefd=False)
signal.signal(signal.SIGINT, signal.default_int_handler)
"""
    process = warm.start(terminal + textwrap.dedent(SCRIPT))
    seen = b""

    def wait_for(wanted):
        nonlocal seen
        while wanted not in seen:
            assert select.select([ours], [], [], 120)[0], seen
            seen += os.read(ours, 4096)

    try:
        wait_for(b"> ")
        os.close(theirs)
        os.write(ours, b"99+21\n")
        wait_for(b"right")
        seen = seen[seen.index(b"right") :]
        wait_for(b"> ")
        # CPython's line reader sleeps through a signal that comes just before it waits for keys: press until it ends.
        for _ in range(10):
            os.write(ours, key)
            with contextlib.suppress(AssertionError):
                process.wait(timeout=5)
                break
        assert process.poll() == 0
        with contextlib.suppress(OSError):  # a closed terminal reads as an error on Linux
            while chunk := os.read(ours, 4096):
                seen += chunk
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        os.close(ours)
    assert b"Traceback" not in seen
