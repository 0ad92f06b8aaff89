"""lm-evaluation-harness on our models: the same GSM8K numbers as our scorer, and log-likelihoods by hand.

lm-eval is large and in no extra that `make test` installs; what needs it is skipped without it.
"""

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.evaluate.test_word_scores import problems, writer
from trivium.cli import main
from trivium.config import UserError
from trivium.evaluate import harness
from trivium.evaluate.answers import evaluate
from trivium.evaluate.config import EvaluateConfig
from trivium.evaluate.harness import Harnessed, run_harness
from trivium.model.context import model_context
from trivium.model.decoder import DecoderConfig
from trivium.tasks.addition import AdditionConfig

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed; pip install 'trivium[score]'"
)
OUTPUTS = (
    "#### 6<end>",
    "its at<end>",
    "It is 6.<end>",
    "#### 8,<end>",
    "#### 9.\n#### 1<end>",
    "is 10 #### 3<end>",
    "ads 13,000.00 as 13.<end>",
)


def written(folder: Path, data: Path, old: str = "", new: str = "") -> Path:
    """Write the task file of the data page, its data at `data`."""
    text = re.findall(r"```yml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[-1]
    assert "data/gsm8k/test.jsonl" in text
    assert old in text
    path = folder / "task.yaml"
    path.write_text(text.replace("data/gsm8k/test.jsonl", str(data)).replace(old, new), encoding="utf-8")
    return path


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")  # those of its libraries
def test_gsm8k_has_the_same_numbers_as_our_scorer(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    task = problems(tmp_path)
    outputs = {example.prompt: text for example, text in zip(task.problems("test"), OUTPUTS, strict=True)}
    model = writer(task, lambda example: outputs[example.prompt])
    path = written(tmp_path, tmp_path / "test.jsonl")
    theirs = run_harness(model, task, [str(path)])["tasks"]["gsm8k_plain"]
    ours = evaluate(model, task, EvaluateConfig(examples=99))["readings"]
    assert theirs["metrics"]["exact_match,strict-match"] == pytest.approx(ours["strict"]["rate"], abs=1e-12)
    assert theirs["metrics"]["exact_match,flexible-extract"] == pytest.approx(ours["flexible"]["rate"], abs=1e-12)
    assert (ours["strict"]["successes"], ours["flexible"]["successes"], theirs["problems"]) == (3, 4, 7)
    assert 0 < theirs["errors"]["exact_match,strict-match"] < 1
    limited = run_harness(model, task, [str(path)], limit=2)
    assert (limited["tasks"]["gsm8k_plain"]["problems"], limited["limit"], limited["cut"]) == (2, 2, 0)
    with pytest.raises(UserError, match=r"cannot be loaded \(FileNotFoundError: .*; without a network, give a YAML"):
        run_harness(model, task, [str(written(tmp_path, tmp_path / "absent.jsonl"))])
    strange = written(tmp_path, tmp_path / "test.jsonl", '"{{question}}\\n"', '"{{question}}~"')
    with pytest.raises(UserError, match=r"--harness: character '~' .* is not in the alphabet"):
        run_harness(model, task, [str(strange)])
    with pytest.raises(UserError, match=r"--harness: .*nothing\.yaml: no such file"):
        run_harness(model, task, [str(tmp_path / "nothing.yaml")])


def scored() -> tuple[Any, Any]:
    """Return a small model of random weights that reads 16 tokens, and its task."""
    task = AdditionConfig(max_digits=3).build()
    config = DecoderConfig(width=16, heads=2, layers="attention*1", positions="learned", max_length=16)
    torch.manual_seed(0)
    return config.build(model_context(task, config)).eval(), task


def nats_by_hand(model: Any, ids: list[int], start: int) -> tuple[float, bool]:
    with torch.no_grad():
        logits, _ = model(torch.tensor([ids[:-1]]))
    shares = logits[0].float().log_softmax(-1)[start - 1 :]
    wanted = ids[start:]
    total = sum(shares[place, index].item() for place, index in enumerate(wanted))
    return total, shares.argmax(-1).tolist() == wanted


def test_log_likelihoods_are_those_of_the_continuation_alone():
    model, task = scored()
    ours, encode = Harnessed(model, task, 4), task.alphabet.encode
    pairs = [("12+34=", "46"), ("1+1=", "2"), ("", "12"), ("1+", "2=3<end>")]
    found = ours.log_likelihoods(pairs)
    for (context, continuation), (value, likely) in zip(pairs, found, strict=True):
        ids = encode(context + continuation)
        start = len(encode(context))
        if not context:
            ids, start = [task.alphabet.end_id, *ids], 1
        wanted = nats_by_hand(model, ids, start)
        assert value == pytest.approx(wanted[0], rel=1e-5)
        assert likely == wanted[1]
    room = ours.room
    long = "1" * (room + 5)
    (value, _), *_ = ours.log_likelihoods([(long, "23")])
    assert value == pytest.approx(nats_by_hand(model, encode(long + "23")[-room - 1 :], room - 1)[0], rel=1e-5)
    assert ours.cut == 1
    whole = ours.rolling(["12+34="])[0]
    assert whole == pytest.approx(nats_by_hand(model, [task.alphabet.end_id, *encode("12+34=")], 1)[0], rel=1e-5)
    assert math.isfinite(whole)


def test_a_context_that_fits_is_kept_whole_and_stops_cut_the_answer():
    model, task = scored()
    ours = Harnessed(model, task, 4)
    texts = ours.continued([("12+34=", {"max_gen_toks": 99}), ("12+34=", {"max_gen_toks": 99, "until": []})])
    assert texts[0] == texts[1]
    ours.continued([("1" * ours.room, {"max_gen_toks": 4})])
    assert ours.cut == 0
    ours.continued([("1" * (ours.room + 1), {"max_gen_toks": 4})])
    assert ours.cut == 1
    assert harness._until("a 3. Q: b", ["Q:", "."]) == "a 3"
    assert harness._until("a", None) == "a"


def test_without_lm_eval_the_pip_command_is_told(monkeypatch):
    model, task = scored()
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs lm-eval, which is not installed; pip install 'trivium\[score\]'"):
        run_harness(model, task, ["gsm8k"])


def test_options_that_do_not_go_together_are_refused(capsys):
    for given, message in (
        (["--limit", "3"], "--limit: belongs to --harness, which is not given"),
        (["--harness", "gsm8k", "--calculator"], "--calculator: given beside --harness"),
        (["--harness", "gsm8k", "--perplexity", "a.txt"], "--harness: given beside --perplexity"),
        (["--harness", "gsm8k", "--lengths", "3"], "--lengths: given beside --harness, which has its own problems"),
    ):
        assert main(["eval", "nowhere", *given]) == 2
        assert message in capsys.readouterr().err
