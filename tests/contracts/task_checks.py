"""What every task promises, as functions that raise AssertionError; `test_tasks` also runs them on broken tasks."""

from functools import lru_cache

import numpy as np

from trivium.config import UserError
from trivium.tasks.base import ANSWER, CHAIN, PAD, PROMPT, SPLITS, Batch, Example, Split, Task, Verdict

COUNT = 12


def splits_of(task: Task) -> list[Split]:
    """Return the splits that have problems: a task of files may lack some."""
    found: list[Split] = []
    for split in SPLITS:
        try:
            task.example(split, 0)
        except UserError:
            continue
        found.append(split)
    assert "train" in found
    return found


def count_of(task: Task, split: Split) -> int:
    size = task.size(split)
    return COUNT if size is None else min(COUNT, size)


@lru_cache(maxsize=3)  # each check of a task reads the same ones
def examples_of(task: Task, split: Split) -> list[Example]:
    return task.examples(split, np.arange(count_of(task, split)))


def check_example_is_a_pure_function_of_its_index(task: Task) -> None:
    other = task.config.build()
    for split in splits_of(task):
        forwards = [task.example(split, index) for index in range(count_of(task, split))]
        backwards = [other.example(split, index) for index in reversed(range(count_of(task, split)))]
        assert forwards == backwards[::-1], split
        assert task.examples(split, np.arange(len(forwards))) == forwards, split


def assert_equal(batch: Batch, expected: Batch) -> None:
    for name in Batch.__dataclass_fields__:
        ours, theirs = getattr(batch, name), getattr(expected, name)
        if ours is None or theirs is None:
            assert ours is theirs, name
            continue
        assert ours.dtype == theirs.dtype, name
        assert ours.shape == theirs.shape, name
        assert (ours == theirs).all(), name


def check_batch_equals_collated_examples(task: Task) -> None:
    for split in splits_of(task):
        count = count_of(task, split)
        assert_equal(task.batch(split, 0, count), task.collate(examples_of(task, split)))
        start = count // 3
        assert_equal(task.batch(split, start, 2), task.collate([task.example(split, start + i) for i in range(2)]))
        scattered = np.array([count - 1, 0, count // 2, 0])
        assert_equal(task.gather(split, scattered), task.collate([task.example(split, int(i)) for i in scattered]))


def check_a_batch_holds_what_encode_gives(task: Task) -> None:
    for split in splits_of(task):
        batch = task.batch(split, 0, count_of(task, split))
        width = batch.tokens_BT.shape[1]
        for b, example in enumerate(examples_of(task, split)):
            tokens, targets, weights = task.encode(example)
            regions = task.regions(example)
            target_regions = task.target_regions(example)
            length = len(tokens)
            assert len(targets) == len(weights) == len(target_regions) == length == batch.lengths_B[b]
            if task.labels:
                assert tokens == task.alphabet.encode(example.prompt)
                labels = [target for target, weight in zip(targets, weights, strict=True) if weight]
                assert labels == task.alphabet.encode(example.answer)[:-1], "the answer is the labels, in order"
            else:
                assert target_regions == regions[1:]
                whole = tokens + targets[-1:]
                if task.checks_answers:
                    assert whole == task.alphabet.encode(example.prompt) + task.alphabet.encode(example.answer)
                assert task.alphabet.decode(whole) == example.prompt + example.answer
                assert targets[:-1] == tokens[1:], "each target is the token that follows"
            assert batch.tokens_BT[b].tolist() == tokens + [task.alphabet.pad_id] * (width - length)
            assert batch.targets_BT[b].tolist() == targets + [task.alphabet.pad_id] * (width - length)
            assert batch.regions_BT[b].tolist() == target_regions + [PAD] * (width - length)
            assert batch.weights_BT[b].tolist() == weights + [0.0] * (width - length)
            scored = np.isin(batch.regions_BT[b], (CHAIN, ANSWER))
            assert (scored == (batch.weights_BT[b] > 0)).all(), "exactly chain and answer are scored"
            assert scored.any()
            assert batch.prompt_lengths_B[b] == len(task.alphabet.encode(example.prompt))
            assert regions[: batch.prompt_lengths_B[b]] == [PROMPT] * int(batch.prompt_lengths_B[b])


def check_splits_share_no_problem(task: Task) -> None:
    seen: dict[object, Split] = {}
    for split in splits_of(task):
        size = task.size(split)
        count = 150 if size is None else min(150, size)
        for example in task.examples(split, np.arange(count)):
            assert seen.setdefault(task.canonical(example), split) == split, example


def check_only_the_whole_answer_is_right(task: Task) -> None:
    end, alphabet = task.alphabet.end, task.alphabet
    for split in splits_of(task):
        for example in examples_of(task, split):
            answer = example.answer
            if not task.checks_answers:
                assert not task.verify(example, answer).correct, "text has no right answer"
                continue
            assert answer.endswith(end)
            body = answer.removesuffix(end)
            # The answer's own symbols, without a chain of thought before it.
            regions = task.regions(example)[len(alphabet.encode(example.prompt)) :]
            ids = [id for id, region in zip(alphabet.encode(answer), regions, strict=True) if region == ANSWER]
            head = answer.removesuffix(alphabet.decode(ids))
            symbols = [alphabet.symbols[index] for index in ids[:-1]]
            other = [next(s for s in alphabet.symbols if s not in (symbol, end, alphabet.pad)) for symbol in symbols]
            assert task.verify(example, answer).correct
            assert task.verify(example, answer + alphabet.pad).correct
            if not task.labels:
                assert task.verify(example, example.prompt + answer).correct, "a prompt in front is stripped"
            assert not task.verify(example, body).correct, "an answer without end is not finished"
            assert not task.verify(example, "").correct
            assert not task.verify(example, head + end).correct
            assert not task.verify(example, head + "".join(symbols[:-1]) + end).correct, "a prefix is wrong"
            longer = task.verify(example, head + "".join([*symbols, symbols[-1]]) + end)
            assert task.reads_values or not longer.correct, "too long"
            for place in range(len(symbols)):
                wrong = [*symbols[:place], other[place], *symbols[place + 1 :]]
                assert not task.verify(example, head + "".join(wrong) + end).correct, wrong


def check_max_length_bounds_every_problem(task: Task) -> None:
    for split in splits_of(task):
        batch = task.batch(split, 0, count_of(task, split))
        assert batch.lengths_B.max() + 1 <= task.max_length


def check_text_and_tokens_are_the_same(task: Task) -> None:
    for split in splits_of(task):
        for example in examples_of(task, split):
            text = example.prompt + example.answer
            ids = task.alphabet.encode(text)
            assert task.alphabet.decode(ids) == text
            assert task.alphabet.encode(example.prompt) == ids[: len(task.alphabet.encode(example.prompt))], (
                "a prompt alone has the tokens that it has before its answer"
            )


class ReadAhead(Task):
    """A task whose `example` comes from blocks of `examples`: one by one they take as long as 64 at once."""

    def __init__(self, task: Task, split: Split):
        self._task, self._split, self._read = task, split, []

    def size(self, split: Split) -> int | None:
        return self._task.size(split)

    def canonical(self, example: Example) -> object:
        return self._task.canonical(example)

    def verify(self, example: Example, text: str) -> Verdict:
        return self._task.verify(example, text)

    def example(self, split: Split, index: int, stage: int = 0) -> Example:
        assert (split, stage) == (self._split, 0)
        while index >= len(self._read):
            size, start = self.size(split), len(self._read)
            stop = start + 64 if size is None else min(start + 64, size)
            self._read += self._task.examples(split, np.arange(start, stop))
        return self._read[index]


def check_distinct_problems_differ(task: Task) -> None:
    other = task.config.build()
    for split in splits_of(task):
        indices = task.distinct(split, COUNT)
        examples = task.examples(split, indices)
        assert len({task.canonical(example) for example in examples}) == len(indices)
        assert (np.diff(indices) > 0).all()
        assert indices.tolist() == Task.distinct(ReadAhead(task, split), split, COUNT).tolist()
        assert examples == other.examples(split, indices), "what is kept is the same"


def check_every_problem_has_the_same_tags(task: Task) -> None:
    names = {tuple(sorted(example.tags)) for split in splits_of(task) for example in examples_of(task, split)}
    assert len(names) == 1
    for split in splits_of(task):
        assert all(
            isinstance(value, int | str) for example in examples_of(task, split) for value in example.tags.values()
        )


def check_tag_values_are_those_of_the_examples(task: Task) -> None:
    for split in splits_of(task):
        examples = examples_of(task, split)
        tags = task.tag_values(split, np.arange(len(examples)))
        if tags is not None:
            assert [dict(example.tags) for example in examples] == [
                {tag: values_B[row].item() for tag, values_B in tags.items()} for row in range(len(examples))
            ]


def check_what_has_steps_has_a_chain(task: Task) -> None:
    for split in splits_of(task):
        for example in examples_of(task, split):
            assert CHAIN in task.target_regions(example) or not task.steps(example, example.answer)


CHECKS = [check for name, check in sorted(globals().items()) if name.startswith("check_")]
