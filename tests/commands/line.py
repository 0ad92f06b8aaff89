"""What the tests of the command line run and how they read its answer."""

from trivium import cli

RECIPE = """\
task:  {kind: addition, format: reversed, max_digits: 2}
model: {width: 16, heads: 2, positions: block, layers: "attention*1"}
train: {steps: 3, batch: 8, eval_every: 3, eval_examples: 8, save_every: 3, precision: float32, threads: 1}
evaluate: {examples: 8}
compare:
  seeds: [0]
  variants:
    attention: {model.layers: "attention*1"}
    local: {model.layers: "attention(window=3)*1"}
"""


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """Run the command line in this process; return (exit status, standard output, standard error)."""
    capsys.readouterr()
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    out, err = capsys.readouterr()
    return status, out, err


def assert_refused(outcome: tuple[int, str, str], *messages: str) -> None:
    """Exit status 2, nothing on standard output, and at most two lines that hold `messages`."""
    status, out, err = outcome
    assert status == 2, err
    assert out == ""
    assert 1 <= len(err.strip().splitlines()) <= 2, err
    assert "Traceback" not in err
    for message in messages:
        assert message in err
