"""Scores at one length at a time, and tasks whose answers are labels of what is read."""

import json

import numpy as np
import pytest

from tests.scripted import ScriptedModel, solver
from trivium.config import UserError
from trivium.data.tokenizers import CharacterTokenizer
from trivium.evaluate.answers import evaluate, evaluate_file
from trivium.evaluate.config import EvaluateConfig
from trivium.evaluate.lengths import scores_by_length
from trivium.evaluate.published import check_published, scores_of_published
from trivium.evaluate.statistics import rate
from trivium.generate.chat import Chat, render
from trivium.generate.labels import read_labels
from trivium.model.context import model_context
from trivium.model.decoder import DecoderConfig
from trivium.tasks.addition import AdditionConfig
from trivium.tasks.group_words import GroupWordsConfig
from trivium.tasks.recall import RecallConfig

TASK = GroupWordsConfig(group="Z2", min_length=3, max_length=8, test_fraction=0.3).build()


def tracker(task, reach=10**9, room=64):
    """A model that tells the right product of up to `reach` elements, and the element itself behind."""

    def script(history):
        if task.alphabet.end_id in history:
            return task.alphabet.end_id  # padding
        return task.solve(list(history))[-1] if len(history) <= reach else history[-1]

    return ScriptedModel(script, len(task.alphabet), room)


def test_labels_are_read_and_not_generated():
    model = tracker(TASK)
    result = evaluate(model, TASK, EvaluateConfig(examples=20, batch=8, samples=2))
    assert result["exact_match"] == rate(20, 20)
    assert result["token_accuracy"] == 1
    assert result["generated_tokens_per_problem"] == 0
    assert result["by_length"] == {}
    assert [sample["generated"] for sample in result["samples"]["right"]] == [
        sample["wanted"] for sample in result["samples"]["right"]
    ]


def test_a_model_that_loses_track_is_scored_place_by_place():
    lengths = (4, 9, 12)
    scores = scores_by_length(tracker(TASK, reach=5), TASK, EvaluateConfig(examples=40, batch=16, lengths=lengths))
    assert list(scores) == ["4", "9", "12"]
    assert scores["4"]["exact_match"]["rate"] == 1
    assert scores["4"]["token_error"]["successes"] == 0
    for length in (9, 12):
        found, sized = scores[str(length)], TASK.at_length(length)
        indices = sized.distinct("test", 40)
        assert found["examples"] == len(indices) == found["exact_match"]["n"]
        wrong_BT = np.array(
            [
                [length_read > 5 and product != element for length_read, (product, element) in enumerate(pairs, 1)]
                for example in sized.examples("test", indices)
                for pairs in [list(zip(example.answer.removesuffix("<end>"), example.prompt, strict=True))]
            ]
        )
        assert found["by_position"] == {"wrong": wrong_BT.sum(axis=0).tolist(), "n": [len(indices)] * length}
        assert found["exact_match"] == rate(int((~wrong_BT.any(axis=1)).sum()), len(indices))
        assert found["token_error"] == rate(int(wrong_BT.sum()), wrong_BT.size)
    assert json.loads(json.dumps(scores)) == scores


def test_exact_match_by_length_is_that_of_the_evaluation_at_that_length():
    model = tracker(TASK, reach=5)
    at_six = evaluate(model, TASK.at_length(6), EvaluateConfig(examples=30))
    found = evaluate(model, TASK, EvaluateConfig(examples=30, lengths=(6,)))["by_length"]["6"]
    assert found["exact_match"] == at_six["exact_match"]
    assert 1 - found["token_error"]["rate"] == pytest.approx(at_six["token_accuracy"])
    assert 0 < found["exact_match"]["rate"] < 1


def test_generated_answers_are_scored_by_length_too():
    task = AdditionConfig(format="plain").build()
    model = solver(task, lambda example, _: example.answer if example.tags["digits"] < 4 else "0<end>", 40)
    scores = scores_by_length(model, task, EvaluateConfig(examples=10, lengths=(2, 4)))
    assert [scores[length]["exact_match"]["rate"] for length in ("2", "4")] == [1, 0]
    assert scores["2"]["token_error"]["rate"] == 0 < scores["4"]["token_error"]["rate"]
    assert scores["4"]["by_position"] is None


def test_only_the_queries_of_a_recall_problem_are_read():
    task = RecallConfig(vocabulary=16, pairs=2, min_length=8, max_length=8).build()

    def script(history):
        first = dict(zip(history[:4:2], history[1:4:2], strict=False))
        return first.get(history[-1], 0)

    model = ScriptedModel(script, len(task.alphabet), 64)
    result = evaluate(model, task, EvaluateConfig(examples=12, lengths=(6, 20)))
    assert result["exact_match"]["rate"] == 1
    assert [scores["exact_match"]["rate"] for scores in result["by_length"].values()] == [1, 1]
    assert sum(result["by_length"]["20"]["by_position"]["n"]) == 2 * result["by_length"]["20"]["examples"]


def test_lengths_that_nobody_can_read_are_refused():
    with pytest.raises(UserError, match=r"evaluate.lengths: 65: .* the model reads at most 64"):
        scores_by_length(tracker(TASK), TASK, EvaluateConfig(lengths=(65,)))
    with pytest.raises(UserError, match="lengths: expected different"):
        EvaluateConfig(lengths=(3, 3))
    recall = RecallConfig(vocabulary=16, pairs=2, min_length=8, max_length=8).build()
    with pytest.raises(UserError, match=r"evaluate.lengths: 5: .*expected 6"):
        model_context(recall, DecoderConfig(), (5,))


def test_a_model_is_built_for_the_longest_length_that_it_is_read_at():
    assert model_context(TASK, DecoderConfig()).max_length == 9
    assert model_context(TASK, DecoderConfig(), (5, 30)).max_length == 31
    assert model_context(TASK, DecoderConfig(), (5,)).max_length == 9
    with pytest.raises(UserError, match=r"12 is shorter than the longest of evaluate.lengths; allowed: 31"):
        model_context(TASK, DecoderConfig(max_length=12), (5, 30))


def test_the_labels_of_a_row_do_not_depend_on_the_rows_beside_it():
    model = tracker(TASK)
    prompts = [TASK.alphabet.encode(text) for text in ("1101", "1", "10110111")]
    together = read_labels(model, prompts, batch=3)
    assert [found.tokens for found in together] == [TASK.solve(prompt) for prompt in prompts]
    assert together == [found for prompt in prompts for found in read_labels(model, [prompt])]
    assert together[0].probabilities == pytest.approx([1] * 4)
    with pytest.raises(UserError, match="empty prompt"):
        read_labels(model, [[]])
    with pytest.raises(UserError, match="read, not sampled"):
        read_labels(model, prompts, temperature=0.5)


def test_a_file_of_words_is_scored_and_a_wrong_number_of_labels_refused(tmp_path):
    path = tmp_path / "words.jsonl"
    path.write_text('{"prompt": "1101", "answer": "1001"}\n{"prompt": "11", "answer": "11"}\n')
    result = evaluate_file(tracker(TASK), TASK, path, EvaluateConfig())
    assert (result["exact_match"]["successes"], result["exact_match"]["n"]) == (1, 2)
    path.write_text('{"prompt": "1101", "answer": "100"}\n')
    with pytest.raises(UserError, match=r"words.jsonl:1: .*4 places to label, its answer has 3"):
        evaluate_file(tracker(TASK), TASK, path, EvaluateConfig())


def test_a_word_can_be_put_to_a_model_in_a_chat():
    chat = Chat(tracker(TASK, reach=3), CharacterTokenizer(TASK.alphabet), TASK)
    reply = chat.answer("1 1 0 0")
    assert (reply.prompt, reply.generated, reply.verdict.correct) == ("1100", "1000", True)
    reply = chat.answer("10011")
    assert (reply.generated, reply.verdict.correct, reply.verdict.reason) == ("11111", False, "11101 is right")
    assert reply.probabilities == pytest.approx([1] * 5)
    assert render(reply).plain == "10011 11111\n  answer  11111  wrong: 11101 is right"
    with pytest.raises(UserError, match="read, not sampled"):
        Chat(tracker(TASK), CharacterTokenizer(TASK.alphabet), TASK, temperature=1.0)


def test_a_map_scores_each_pair_of_lengths():
    task = AdditionConfig(format="reversed", max_digits=3).build()

    def script(history):
        text = task.alphabet.decode(list(history))
        if "=" not in text:
            return 0
        prompt = text[: text.index("=") + 1]
        first, second = task.notation.read_prompt(prompt)[0]
        wanted = task.alphabet.encode(task.example_of([first, second]).answer)
        place = len(history) - len(prompt)
        right = wanted[place] if place < len(wanted) else task.alphabet.end_id
        return right if first < 1000 else task.alphabet.id_of("0")  # a first number of four digits is too much for it

    model = ScriptedModel(script, len(task.alphabet), 30)
    config = EvaluateConfig(examples=5, batch=7, pairs=(2, 4), pair_examples=6)
    assert evaluate(model, task, config)["by_pair"] == {
        "2x2": rate(6, 6),
        "2x4": rate(6, 6),
        "4x2": rate(0, 6),
        "4x4": rate(0, 6),
    }
    with pytest.raises(UserError, match=r"evaluate.pairs: 2x12: problems of 2. tokens, the model reads at most 20"):
        evaluate(ScriptedModel(script, len(task.alphabet), 20), task, EvaluateConfig(examples=5, pairs=(2, 12)))
    with pytest.raises(UserError, match=r"evaluate.pairs: 3x3: .* have no two lengths"):
        evaluate(tracker(TASK), TASK, EvaluateConfig(examples=5, pairs=(3,)))


def test_a_published_test_is_scored_beside_the_tasks_own(monkeypatch):
    task = AdditionConfig(format="reversed", max_digits=10, zero_pad=True).build()
    whole = task.published
    monkeypatch.setattr(task, "published", lambda name: whole(name)[:60])
    answer = task.alphabet.encode("00000000000<end>")

    def script(history):
        place = len(history) - 22
        return answer[place] if 0 <= place < len(answer) else task.alphabet.end_id

    scores = scores_of_published(ScriptedModel(script, len(task.alphabet), 40), task, ["adderboard"], batch=25)
    assert scores["adderboard"]["exact_match"] == rate(1, 60)  # 0 + 0
    assert len(scores["adderboard"]["wrong"]) == 20
    with pytest.raises(UserError, match=r"evaluate.published: no test set 'gsm'"):
        check_published(task, ["gsm"], 40)
    with pytest.raises(UserError, match=r"evaluate.published: adderboard: 33 tokens, the model reads at most 32"):
        check_published(task, ["adderboard"], 32)
