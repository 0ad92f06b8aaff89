"""The README.md of a model folder, which the Hugging Face hub shows as the model's card."""

from collections.abc import Mapping
from typing import Any

from trivium.config import to_yaml

MARK = "<!-- Written by Trivium; remove this line to keep what you write here. -->"
_HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- trivium
---

"""


def training_record(recipe: Mapping[str, Any], result: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what config.json keeps of a training run, given its configuration as plain data and its result.json.

    Without a result the run has not finished, and nothing of it is scored.
    """
    if result is None:
        return {"recipe": dict(recipe), "finished": False}
    kept = ("step", "tokens", "examples", "seconds", "parameters", "device", "precision")
    evaluation = result["evaluation"]
    scores = {name: value for name, value in evaluation.items() if _is_rate(value)}
    scores |= {
        f"{name} at length {length}": score
        for length, scores_ in evaluation.get("by_length", {}).items()
        for name, score in scores_.items()
        if _is_rate(score)
    }
    return {
        "recipe": dict(recipe),
        "finished": True,
        **{name: result[name] for name in kept if name in result},
        "split": evaluation["split"],
        "task_version": evaluation["task_version"],
        "scores": scores,
    }


def _is_rate(value: Any) -> bool:
    return isinstance(value, Mapping) and {"rate", "low", "high", "n"} <= value.keys()


def model_card(described: Mapping[str, Any]) -> str:
    """Return the card of the model that config.json, as plain data, describes: task, tokens, scores, how to repeat."""
    task, model = described["task"], described["model"]
    trained = described.get("trained")
    kind = task.get("kind", "unknown")
    lines = [
        f"{_HEAD}{MARK}\n",
        f"# A {model.get('kind', 'decoder')} for the task {kind}\n",
        f"Layers `{model['layers']}`, width {model.get('width')}, {described['vocab_size']} tokens in the vocabulary, "
        f"{described.get('max_position_embeddings')} tokens at most.\n"
        if "layers" in model
        else "",
        "## Use\n",
        "```python\nimport trivium.hub  # registers the model with transformers; pip install 'trivium[hf]'\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER OR REPOSITORY")\n'
        'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER OR REPOSITORY")\n```\n',
        "## Training\n",
    ]
    return "\n".join([line for line in lines if line] + (_training(trained) if trained else [_UNKNOWN])) + "\n"


_UNKNOWN = "Nothing is recorded of how it was trained.\n"


def _training(trained: Mapping[str, Any]) -> list[str]:
    lines = []
    if trained["finished"]:
        precision, seconds = trained.get("precision"), trained.get("seconds", 0)
        lines.append(
            f"{trained['tokens']:,} tokens in {trained['step']:,} steps and {seconds:,.0f} s, {precision} on "
            f"{trained.get('device')}; {trained.get('parameters', 0):,} parameters.\n"
        )
        lines += [
            f"## Scores\n\nOn unseen problems ({trained['split']} split, task version {trained['task_version']}):\n"
        ]
        lines += ["| score | rate | 95 % interval | of |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {name.replace('_', ' ')} | {_percent(score['rate'])} | {_percent(score['low'])} to "
            f"{_percent(score['high'])} | {score['n']:,} |"
            for name, score in trained["scores"].items()
        ]
    else:
        lines.append("The training had not finished when this model was written; it is not scored.\n")
    recipe = to_yaml(trained["recipe"])
    lines.append(f"\n## To repeat it\n\n`trivium train recipe.yaml`, with this recipe.yaml:\n\n```yaml\n{recipe}```")
    return lines


def _percent(rate: float | None) -> str:
    return "none" if rate is None else f"{rate:.2%}"
