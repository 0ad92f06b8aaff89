"""The card of a model folder, and what push_to_hub sends."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

from tests.hub.models import load
from trivium.model.card import MARK, training_record
from trivium.model.folder import load_model, record_training, save_model

RESULT = {
    "step": 12,
    "tokens": 3456,
    "seconds": 7.5,
    "parameters": 789,
    "device": "cpu",
    "precision": "float32",
    "evaluation": {
        "split": "test",
        "task_version": 1,
        "exact_match": {"rate": 0.25, "low": 0.125, "high": 0.5, "successes": 5, "n": 20},
        "token_accuracy": 0.5,
        "by_length": {},
    },
}


class Hub:
    """What of the hub's client push_to_hub calls; nothing leaves this process."""

    def __init__(self, card: str | None = None):
        self.card = card
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        return mock.Mock(repo_id=f"someone/{repo_id}")

    def load_card(self, *_: Any, **__: Any) -> Any:
        from huggingface_hub import ModelCard

        text = (
            self.card
            if self.card is not None
            else "---\nlibrary_name: transformers\n---\n\n# Model Card for Model ID\n"
        )
        return ModelCard(text)

    def upload(self, model: Any, working_dir: Any, repo_id: str, *_: Any, **__: Any) -> str:
        self.files = {path.name: path.read_bytes() for path in Path(working_dir).iterdir()}
        return repo_id

    def push(self, model: Any) -> str:
        with (
            mock.patch("transformers.utils.hub.hf_api", return_value=self),
            mock.patch("transformers.utils.hub.create_and_tag_model_card", self.load_card),
            mock.patch("transformers.utils.hub.PushToHubMixin._upload_modified_files", self._uploader()),
        ):
            model.push_to_hub("adder")
        return self.files["README.md"].decode()

    def _uploader(self) -> Any:
        return lambda model, working_dir, repo_id, *args, **kwargs: self.upload(model, working_dir, repo_id)


def test_push_to_hub_sends_safetensors_and_a_card_with_task_tokens_scores_and_the_command(folder: Path):
    record_training(folder, training_record({"task": {"kind": "addition"}, "train": {"steps": 12}}, RESULT))
    hub = Hub()
    card = hub.push(load(folder))
    assert set(hub.files) == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert card == (folder / "README.md").read_text()
    for part in (
        "for the task addition",
        "3,456 tokens in 12 steps",
        "| exact match | 25.00% | 12.50% to 50.00% | 20 |",
        "`trivium train recipe.yaml`",
        "  kind: addition",
        "library_name: transformers",
        "import trivium.hub",
    ):
        assert part in card
    assert "token accuracy" not in card


def test_a_card_that_a_person_wrote_is_kept(folder: Path):
    assert Hub("---\n{}\n---\n# Mine\n").push(load(folder)).endswith("# Mine\n")
    assert "# Mine" not in Hub(f"---\n{{}}\n---\n{MARK}\n# Mine\n").push(load(folder))
    (folder / "README.md").write_text("# Mine\n")
    record_training(folder, training_record({"train": {}}, None))
    model, _, task = load_model(folder)
    save_model(folder, model, task.config)
    assert (folder / "README.md").read_text() == "# Mine\n"


def test_a_run_that_has_not_finished_says_so_in_its_card(folder: Path):
    record_training(folder, training_record({"train": {"steps": 5}}, None))
    assert "had not finished" in (folder / "README.md").read_text()
    assert json.loads((folder / "config.json").read_text())["trained"] == {
        "recipe": {"train": {"steps": 5}},
        "finished": False,
    }
