"""Files from the Hugging Face hub, or an error that says what to place where when there is no way to it."""

import importlib.util
import logging
import re
from pathlib import Path

from trivium.registry import UserError

PATIENCE = 5  # seconds for the hub to answer at all
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

_log = logging.getLogger("trivium")


def names_repository(place: str) -> bool:
    """Say whether `place` could be a repository of the hub, such as gpt2 or openai-community/gpt2."""
    return _REPOSITORY.fullmatch(place) is not None


def require_extra(module: str, what: str) -> None:
    """Raise UserError with the pip command unless `module`, which extra `hf` brings, is installed."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{what} needs {module}, which is not installed; pip install 'trivium[hf]' brings it")


def unreachable() -> str | None:
    """Return why the hub does not answer at all, or None where it does, whatever it says.

    Its library asks again and again for half a minute, which helps a busy hub and nobody without a network.
    """
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # each release has its own library of the web, with errors of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"{constants.ENDPOINT} does not answer: {reason}"
    return None


def hub_file(repository: str, name: str, instead: str, *, kind: str = "model", revision: str | None = None) -> Path:
    """Return the local path of file `name` of a hub repository, downloaded unless it is in the hub's cache.

    `kind` is "model" or "dataset", `revision` a commit or branch (default: the newest). Raises UserError when it cannot
    be had; `instead` then tells what the user can do without a network.
    """
    require_extra("huggingface_hub", f"{repository}: a download from the Hugging Face hub")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging as hub_logging

    try:
        return Path(hf_hub_download(repository, name, repo_type=kind, revision=revision, local_files_only=True))
    except Exception:  # not in the cache, which each release says with errors of its own
        _log.info("%s: asking the Hugging Face hub for %s", repository, name)
    silent = unreachable()
    if silent is not None:
        raise UserError(f"{repository}: {name} cannot be had from the Hugging Face hub ({silent}); {instead}")
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # its retries, each a line
    try:
        return Path(hf_hub_download(repository, name, repo_type=kind, revision=revision))
    except Exception as error:  # of the network, the hub, the disk: whatever it is, the user can place the file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{repository}: {name} cannot be had from the Hugging Face hub ({reason}); {instead}") from None
    finally:
        hub_logging.set_verbosity(verbosity)
