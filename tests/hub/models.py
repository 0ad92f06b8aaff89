"""Models with lively weights, saved as runs save them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from trivium.model.base import LanguageModel, ModelConfig
from trivium.model.context import model_context
from trivium.model.decoder import DecoderConfig
from trivium.model.folder import save_model
from trivium.tasks.addition import AdditionConfig

TASK = AdditionConfig(max_digits=2)
BLOCK = DecoderConfig(width=16, heads=2, positions="block", layers="attention(window=3)*1 + gla*1")


def make(config: ModelConfig, folder: Path) -> LanguageModel:
    """Return a model whose norms and biases are not 1 and 0, saved to `folder`, with some room."""
    torch.manual_seed(0)
    context = model_context(TASK.build(), config)
    model = config.build(replace(context, max_length=13)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_model(folder, model, TASK)
    return model


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)
