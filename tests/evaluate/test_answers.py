import json

import pytest

from tests.scripted import ScriptedModel, solver
from trivium.config import UserError
from trivium.data.jsonl import write_jsonl
from trivium.evaluate.answers import evaluate, evaluate_file
from trivium.evaluate.config import EvaluateConfig
from trivium.evaluate.statistics import wilson
from trivium.tasks.addition import Addition, AdditionConfig

FORMATS = ("plain", "reversed", "delimited", "column", "reversed_chain")


def right(example, written):
    return example.answer


@pytest.mark.parametrize("format", FORMATS)
def test_a_perfect_model_is_right_on_every_problem(format):
    # A score that forgot to take the prompt off would give 0.
    task = AdditionConfig(format=format).build()
    result = evaluate(solver(task, right), task, EvaluateConfig(examples=40, batch=16, samples=3))
    low, high = wilson(40, 40)
    assert result["exact_match"] == {"rate": 1.0, "low": low, "high": high, "successes": 40, "n": 40}
    assert result["token_accuracy"] == 1
    assert (result["task"], result["task_version"], result["split"]) == ("addition", task.version, "test")
    assert (result["examples"], result["asked"]) == (40, 40)
    lengths = [len(task.alphabet.encode(task.example("test", i).answer)) for i in task.distinct("test", 40)]
    assert result["generated_tokens_per_problem"] == pytest.approx(sum(lengths) / 40)
    assert [len(result["samples"][key]) for key in ("right", "wrong")] == [3, 0]
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize(
    "spoil",
    [
        lambda answer: answer.replace("<end>", "0<end>"),  # the right answer is a prefix of it
        lambda answer: answer[0] + "<end>",  # a prefix of the right answer
        lambda answer: answer.replace("<end>", "="),  # never ends
        lambda answer: answer.replace("<end>", "+1<end>"),
    ],
)
def test_only_the_whole_answer_is_right(spoil):
    task = AdditionConfig(format="plain", min_digits=2).build()
    result = evaluate(solver(task, lambda example, _: spoil(example.answer)), task, EvaluateConfig(examples=20))
    assert result["exact_match"]["rate"] == 0
    assert all(sample["reason"] for sample in result["samples"]["wrong"])


@pytest.mark.parametrize(
    "fields",
    [
        {"format": "plain", "min_digits": 2},
        {"format": "delimited", "base": 16, "operands": 3},
        {"format": "reversed", "zero_pad": True, "stratify": "carry"},
        {"format": "column"},
    ],
)
def test_scores_of_tokens_are_those_of_texts(fields, monkeypatch):
    # Right, right behind its prompt, a token too many, never ending, empty, and one digit wrong.
    def write(example, written):
        end = task.alphabet.end
        body = example.answer.removesuffix(end)
        wrong = body[:-1] + ("1" if body[-1] == "0" else "0") + end
        ways = [example.answer, example.prompt + example.answer, body + "0" + end, body + "0" * len(body), end, wrong]
        return ways[sum(map(ord, example.prompt)) % len(ways)]

    config, scores = EvaluateConfig(examples=100, batch=64, samples=4), []
    for by_texts in (False, True):
        task = AdditionConfig(**fields).build()
        if by_texts:
            monkeypatch.setattr(task, "tag_values", lambda split, indices, stage: None)
        scores.append(evaluate(solver(task, write, 3 * task.max_length), task, config))
    assert scores[0] == scores[1]
    assert 0.1 < scores[0]["exact_match"]["rate"] < 0.7
    orders = [[(tag, list(values)) for tag, values in score["by_tag"].items()] for score in scores]
    assert orders[0] == orders[1]


def test_a_right_answer_is_judged_without_its_text(monkeypatch):
    task = AdditionConfig(format="plain").build()
    model = solver(task, lambda example, _: "0<end>" if example.tags["carries"] else example.answer)
    read = []
    monkeypatch.setattr(task, "verify", lambda example, text: read.append(text) or Addition.verify(task, example, text))
    result = evaluate(model, task, EvaluateConfig(examples=80, samples=0))
    assert len(read) == result["errors"]["errors"] < 80


def test_what_a_task_reads_in_some_answers_only_is_reported(monkeypatch):
    task = AdditionConfig(format="plain").build()
    carries = [example.tags["carries"] for example in task.examples("test", task.distinct("test", 60))]

    def readings(example, text):
        return {} if example.tags["carries"] == carries[0] else {"unlike the first": task.verify(example, text)}

    monkeypatch.setattr(task, "readings", readings)
    result = evaluate(solver(task, right), task, EvaluateConfig(examples=60))
    assert result["readings"]["unlike the first"]["n"] == sum(count != carries[0] for count in carries) > 0


def test_slices_divide_the_problems_and_show_where_a_model_fails():
    task = AdditionConfig(format="plain").build()
    model = solver(task, lambda example, _: "0<end>" if example.tags["carries"] else example.answer)
    result = evaluate(model, task, EvaluateConfig(examples=80))
    by_carries = result["by_tag"]["carries"]
    assert list(by_carries) == sorted(by_carries, key=int)
    assert {value: entry["rate"] for value, entry in by_carries.items()} == {
        value: float(value == "0") for value in by_carries
    }
    for values in result["by_tag"].values():
        assert sum(entry["n"] for entry in values.values()) == 80
        assert sum(entry["successes"] for entry in values.values()) == result["exact_match"]["successes"]


def test_samples_tell_right_from_wrong():
    task = AdditionConfig(format="plain").build()
    model = solver(task, lambda example, _: "7<end>" if example.tags["carries"] else example.answer)
    samples = evaluate(model, task, EvaluateConfig(examples=80, samples=5))["samples"]
    assert [len(samples[key]) for key in ("right", "wrong")] == [5, 5]
    for sample in samples["right"]:
        assert sample["generated"] == sample["wanted"]
    for sample in samples["wrong"]:
        assert (sample["generated"], sample["correct"]) == ("7<end>", False)
        assert sample["reason"] == f"{sample['wanted'].removesuffix('<end>')} is right"


def test_a_split_with_fewer_problems_than_asked_says_how_many():
    task = AdditionConfig(format="plain", max_digits=1, test_fraction=0.2).build()
    result = evaluate(solver(task, right), task, EvaluateConfig(examples=500))
    assert result["asked"] == 500
    assert result["examples"] == result["exact_match"]["n"] < 55


def test_a_sampled_evaluation_repeats_with_its_seed_whatever_the_batch():
    task = AdditionConfig(format="plain").build()
    vocabulary = len(task.alphabet)
    model = ScriptedModel(lambda history: [0.1 * (history[-1] == v) for v in range(vocabulary)], vocabulary, 13)
    first = evaluate(model, task, EvaluateConfig(examples=30), temperature=1.0, seed=5)
    assert first == evaluate(model, task, EvaluateConfig(examples=30, batch=7), temperature=1.0, seed=5)
    assert first["samples"] != evaluate(model, task, EvaluateConfig(examples=30), temperature=1.0, seed=6)["samples"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_of_the_test_problems_scores_as_the_test_does(format, tmp_path):
    task = AdditionConfig(format=format).build()

    def write(example, written):
        body = example.answer.removesuffix(task.alphabet.end)
        return example.answer if example.tags["carries"] != 1 else body + "9" + task.alphabet.end

    model = solver(task, write)
    write_jsonl(task, "test", 50, tmp_path / "test.jsonl")
    result = evaluate(model, task, EvaluateConfig(examples=50))
    scored = evaluate_file(model, task, tmp_path / "test.jsonl", EvaluateConfig())
    assert 0 < result["exact_match"]["rate"] < 1
    assert {**scored, "split": "test"} == result
    assert scored["split"] == str(tmp_path / "test.jsonl")


def test_a_file_may_leave_the_end_symbol_and_tags_out(tmp_path):
    task = AdditionConfig(format="plain").build()
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "1+2=", "answer": "3"}\n\n{"prompt": "5+5=", "answer": "11"}\n', encoding="utf-8")
    result = evaluate_file(solver(task, right), task, path, EvaluateConfig())
    assert (result["exact_match"]["successes"], result["exact_match"]["n"]) == (1, 2)
    assert result["by_tag"] == {}


def test_tags_of_a_file_are_sliced_numbers_first_and_none_is_lost(tmp_path):
    task = AdditionConfig(format="plain").build()
    path = tmp_path / "mine.jsonl"
    tags = [10, "1", "b", 1, "²", 2, -3]
    rows = [{"prompt": f"{i}+2=", "answer": str(i + 2), "tags": {"kind": tag}} for i, tag in enumerate(tags)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    slices = evaluate_file(solver(task, right), task, path, EvaluateConfig())["by_tag"]["kind"]
    assert {value: entry["n"] for value, entry in slices.items()} == {"-3": 1, "1": 2, "2": 1, "10": 1, "b": 1, "²": 1}
    assert list(slices) == ["-3", "1", "2", "10", "b", "²"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "1+2=", "answer": "three"}', "character 't'"),
        ('{"prompt": "1*2=", "answer": "2"}', "character '\\*'"),
        ('{"prompt": "1+2=", "ansver": "3"}', "unknown key 'ansver'"),
        ('{"prompt": "1+2="}', "answer is missing"),
        ('{"prompt": "1+2=", "answer": 3}', "answer is not text"),
        ('{"prompt": "1+2=", "answer": "3<end>3"}', "the answer goes on behind <end>"),
        ('{"prompt": "1+2=", "answer": "3"', "not JSON"),
        ('{"prompt": "12345678+12345=", "answer": "12358023"}', "too long for the model: 15 tokens"),
        ('{"prompt": "1234+1234=", "answer": "2468"}', "too long for the model: 10 tokens and 5 of its answer"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(line, message, tmp_path):
    task = AdditionConfig(format="plain").build()
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "1+2=", "answer": "3"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"mine.jsonl:3: .*{message}") as caught:
        evaluate_file(solver(task, right), task, path, EvaluateConfig())
    assert "\n" not in str(caught.value)


def test_a_file_without_problems_and_no_file_are_refused(tmp_path):
    task = AdditionConfig(format="plain").build()
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    for name, message in (("empty.jsonl", "no problems"), ("absent.jsonl", "no such file"), (".", "cannot be read")):
        with pytest.raises(UserError, match=message):
            evaluate_file(solver(task, right), task, tmp_path / name, EvaluateConfig())
