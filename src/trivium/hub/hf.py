"""Trivium's language models as transformers knows models: from_pretrained, generate, Trainer, push_to_hub.

This file alone knows of padding on the left: what it is given is put in order, left-aligned, before a model sees it.

Shapes: B rows, T columns of the input, V vocabulary, N columns whose logits are wanted.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from trivium.mixers.base import State
from trivium.model.base import LanguageModel
from trivium.model.card import MARK, model_card
from trivium.model.folder import CARD_FILE, MODEL_TYPE, described_model, described_task, keeps_card
from trivium.registry import UserError

IGNORED = -100  # the label of a place that the loss leaves out


class TriviumConfig(PreTrainedConfig):
    """The content of a model folder's config.json; `model`, `context`, `task` and `decoding` are plain data."""

    model_type = MODEL_TYPE


class StateCache(Cache):
    """A Trivium model's streaming state, as `past_key_values`. A model makes and returns it under `use_cache`.

    `columns` counts the columns read so far, padding included, and `longest` the most tokens that a row may have read.
    """

    def __init__(self, state: State, room: int):
        super().__init__(layers=[])
        self.state, self.room = state, room
        self.columns = self.longest = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.room

    @property
    def batch_size(self) -> int:
        return len(self.state.tensors()[0])

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def is_croppable(self) -> bool:
        return False

    def reset(self) -> None:
        with torch.no_grad():
            self.state = self.state.reset(torch.arange(self.batch_size, device=self.state.tensors()[0].device))
        self.columns = self.longest = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state = self.state.select(beam_idx.to(self.state.tensors()[0].device))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self.batch_size, device=self.state.tensors()[0].device)
        self.state = self.state.select(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a streaming state cannot forget its last tokens; begin again without past_key_values")

    def advance(self, columns: int, longest: int) -> None:
        """Count columns that are about to be read, at most `longest` tokens of a row; ValueError if they do not fit."""
        if self.longest + longest > self.room:
            raise ValueError(
                f"{self.longest + longest} tokens do not fit: this model reads at most {self.room}; "
                "give a shorter prompt or a smaller max_new_tokens"
            )
        self.columns += columns
        self.longest += longest


@dataclass
class _Aligned:
    """How the tokens of a masked batch are put in order: left-aligned, without what the mask leaves out."""

    real_BT: Tensor
    source_BT: Tensor
    place_BT: Tensor
    lengths_B: Tensor

    @classmethod
    def of(cls, mask_BT: Tensor) -> Self:
        real_BT = mask_BT.bool()
        source_BT = real_BT.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        return cls(real_BT, source_BT, (real_BT.cumsum(dim=1) - 1).clamp(min=0), real_BT.sum(dim=1))


class TriviumForCausalLM(PreTrainedModel, GenerationMixin):
    """A Trivium language model, as `model`, behind the interface of transformers."""

    config_class = TriviumConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _is_stateful = True  # so that assisted generation, which takes tokens back, is refused by name

    def __init__(self, config: TriviumConfig):
        super().__init__(config)
        self.model: LanguageModel = described_model(config.to_dict())
        # A model uses its embedding in more than one place: it stays on one device.
        self._no_split_modules = [type(self.model).__name__]
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return logits (B, T, V), or (B, N, V) of the columns that `logits_to_keep` names, and what else was asked.

        `attention_mask` is 1 for tokens and 0 for padding, which may stand anywhere; it covers the columns of
        `past_key_values` too, if those are given. Logits at padding are 0. `labels` are token ids, -100 where the loss
        leaves out; they are moved against the logits here, as far as the model predicts ahead.
        Raises ValueError for shapes that do not fit, more tokens than the model can read, and what it cannot give.
        """
        _refuse(kwargs, labels, logits_to_keep)
        cache = self._cache(input_ids, past_key_values, use_cache)
        rows = _rows(input_ids, attention_mask, cache)
        tokens_BT = input_ids if rows is None else input_ids.gather(1, rows.source_BT)
        columns = input_ids.shape[1]
        if cache is not None:
            longest = 1 if rows is None or columns == 1 else int(rows.lengths_B.max())
            cache.advance(columns, columns if rows is None else longest)
        places_BN, real_BN = self._wanted(input_ids, rows, logits_to_keep)
        logits, state = self.model(
            tokens_BT,
            None if cache is None else cache.state,
            lengths_B=None if rows is None else rows.lengths_B,
            wanted_N=None if places_BN is None else places_BN.flatten(),
        )
        if places_BN is not None:
            logits = logits.unflatten(0, places_BN.shape)
        if real_BN is not None:
            logits = logits.masked_fill(~real_BN[..., None], 0)
        if cache is not None:
            cache.state = state
        loss = None if labels is None else self._loss(logits, labels, rows, kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output if return_dict is not False else output.to_tuple()

    def _cache(self, input_ids: Tensor, given: Cache | None, use_cache: bool | None) -> StateCache | None:
        if given is None:
            if not use_cache:
                return None
            return StateCache(self.model.init_state(len(input_ids)), self._room())
        if not isinstance(given, StateCache):
            raise ValueError(
                f"past_key_values is a {type(given).__name__}; a Trivium model continues only a StateCache, as it "
                "returns with use_cache=True"
            )
        if given.batch_size != len(input_ids):
            raise ValueError(f"past_key_values holds {given.batch_size} rows, input_ids has {len(input_ids)}")
        return given

    def _room(self) -> int:
        return getattr(self.model, "max_length", None) or self.model.context.max_length

    def _wanted(
        self, input_ids: Tensor, rows: _Aligned | None, logits_to_keep: int | Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return (places in the flattened, aligned tokens whose logits are wanted, which of them are tokens).

        None stands for all places, and for tokens everywhere.
        """
        batch, columns = input_ids.shape
        index_T = torch.arange(columns, device=input_ids.device)
        if isinstance(logits_to_keep, int):
            index_T = index_T[max(columns - logits_to_keep, 0) if logits_to_keep else 0 :]
        else:
            index_T = index_T[logits_to_keep]
        if rows is None and len(index_T) == columns and isinstance(logits_to_keep, int):
            return None, None
        row_B1 = torch.arange(batch, device=input_ids.device)[:, None]
        if rows is None:
            return row_B1 * columns + index_T, None
        return row_B1 * columns + rows.place_BT[:, index_T], rows.real_BT[:, index_T]

    def _loss(self, logits: Tensor, labels: Tensor, rows: _Aligned | None, kwargs: dict[str, Any]) -> Tensor:
        if labels.shape != logits.shape[:2]:
            raise ValueError(f"labels are {tuple(labels.shape)}, expected {tuple(logits.shape[:2])} as input_ids")
        ahead = 0 if getattr(self.config, "labels", False) else self.model.decoding.shift + 1
        moved_BT = nn.functional.pad(labels, (0, ahead), value=IGNORED)[:, ahead:].contiguous()
        if rows is not None:
            moved_BT = moved_BT.masked_fill(~rows.real_BT, IGNORED)
        counted = {name: kwargs[name] for name in ("num_items_in_batch",) if kwargs.get(name) is not None}
        return self.loss_function(logits, labels, self.model.context.vocab_size, shift_labels=moved_BT, **counted)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Continue prompts; see `transformers.GenerationMixin.generate`.

        Raises UserError for a model whose logits are not those of the next token.
        """
        reason = self._no_generation()
        if reason is not None:
            raise UserError(f"generate: {reason}")
        return super().generate(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _no_generation(self) -> str | None:
        if self.model.decoding.shift:
            return (
                f"the logits of this model are {self.model.decoding.shift + 1} tokens ahead, those of transformers' "
                "generate one; `trivium chat` and trivium.generate.shifted read them as they were trained"
            )
        labels = getattr(self.config, "labels", None)
        if labels is None:  # a folder that an older version wrote
            labels = described_task(self.config.to_dict(), self.config.name_or_path or ".").labels
        if labels:
            return (
                "this model labels the tokens that it reads and continues nothing; the labels are the logits' largest "
                "entries in one pass"
            )
        return None

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the state is made by the first forward pass

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Return a model of a folder or repository, whole: ValueError if its weights are not those of its config."""
        if kwargs.pop("use_safetensors", True) is False:
            raise ValueError("use_safetensors=False asks for a pickle; Trivium's models are safetensors only")
        tells = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, use_safetensors=True, **kwargs)
        model, info = loaded
        for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(name):
                found = ", ".join(sorted(map(str, info[name]))[:3])
                raise ValueError(f"the weights are not those of config.json: {name.replace('_', ' ')} {found}")
        return (model, info) if tells else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write config.json, safetensors and the model card; see `transformers.PreTrainedModel.save_pretrained`."""
        super().save_pretrained(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        if kwargs.get("is_main_process", True) and folder.is_dir() and keeps_card(folder):
            (folder / CARD_FILE).write_text(model_card(self.config.to_dict()), encoding="utf-8")

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        # transformers has put a card there: an empty form, or the one that the repository has.
        path = Path(working_dir) / CARD_FILE
        there = path.read_text(encoding="utf-8") if path.is_file() else MARK
        if MARK in there or "# Model Card for Model ID" in there:
            path.write_text(model_card(self.config.to_dict()), encoding="utf-8")
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        # Weights start as `build` made them, and come whole from a folder; buffers that no file holds are filled here.
        with torch.no_grad():
            for name in module._non_persistent_buffers_set:  # such as the load of a mixture's experts: nothing yet
                if (buffer := getattr(module, name)) is not None:
                    buffer.zero_()
            reset = getattr(module, "reset_buffers", None)
            if callable(reset):
                reset()

    def get_input_embeddings(self) -> nn.Module:
        size = self.model.context.vocab_size
        tables = (module for module in self.model.modules() if isinstance(module, nn.Embedding))
        return next(table for table in tables if table.num_embeddings == size)

    def get_output_embeddings(self) -> nn.Module | None:
        return getattr(self.model, "head", None)  # None where the embedding is used again, and saved once

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise ValueError("the vocabulary of a Trivium model is its task's; it cannot be given other embeddings")

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        if new_num_tokens in (None, self.model.context.vocab_size):
            return self.get_input_embeddings()
        raise ValueError("the vocabulary of a Trivium model is its task's; it cannot be resized")


def _refuse(kwargs: dict[str, Any], labels: Tensor | None, logits_to_keep: int | Tensor) -> None:
    asked = [name for name, value in kwargs.items() if name != "num_items_in_batch" and value not in (None, False)]
    if asked:
        raise ValueError(f"a Trivium model has no {', '.join(asked)}; give input_ids, attention_mask and labels")
    if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
        raise ValueError("logits_to_keep: a loss needs the logits of all places")


def _rows(input_ids: Tensor, mask: Tensor | None, cache: StateCache | None) -> _Aligned | None:
    """Return how the new columns are put in order, or None if they are as they stand."""
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids are {tuple(input_ids.shape)}, expected (rows, tokens)")
    if mask is None:
        return None
    columns = input_ids.shape[1]
    wanted = (len(input_ids), columns + (0 if cache is None else cache.columns))
    if tuple(mask.shape) != wanted:
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)}, expected {wanted}: the columns so far and the new ones"
        )
    return _Aligned.of(mask[:, wanted[1] - columns :].to(input_ids.device))


AutoConfig.register(MODEL_TYPE, TriviumConfig)
AutoModelForCausalLM.register(TriviumConfig, TriviumForCausalLM)
AutoTokenizer.register(TriviumConfig, fast_tokenizer_class=PreTrainedTokenizerFast)
