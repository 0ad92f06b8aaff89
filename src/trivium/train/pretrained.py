"""Weights of other programs that a run begins with."""

from typing import TYPE_CHECKING, Any, cast

from trivium.model.base import LanguageModel, ModelContext
from trivium.tasks.download import require_extra
from trivium.train.config import RunConfig

if TYPE_CHECKING:
    from trivium.hub.gpt2 import Gpt2


def gpt2_weights(config: RunConfig, context: ModelContext) -> "Gpt2 | None":
    """Return the weights that `model.init_from` names, or None without; UserError if the model cannot hold them."""
    place = getattr(config.model, "init_from", None)
    if place is None:
        return None
    require_extra("transformers", "model.init_from")
    from trivium.hub.gpt2 import check_gpt2, find_gpt2

    found = find_gpt2(place)
    check_gpt2(found, config.model, context)
    return found


def begin_with_gpt2(config: RunConfig, model: LanguageModel) -> None:
    """Give a new model the weights that `model.init_from` names, if it names any; the errors are `gpt2_weights`'s."""
    found = gpt2_weights(config, model.context)
    if found is not None:
        from trivium.hub.gpt2 import load_gpt2

        load_gpt2(found, cast(Any, model))
