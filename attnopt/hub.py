"""Asking the Hub first, briefly: the libraries themselves retry for 23 seconds without network."""

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from attnopt.errors import UserError, one_line

_TIMEOUT_S = 5.0


def why_unreachable(kind: str, name: str, *, flag: str) -> str | None:
    """Return None if the Hub has this repository, else in one line why it cannot be had now.

    kind: "dataset" or "model". flag: how the user named it, for the message.

    Raises UserError when the Hub answers that it is not there or asks for a login.
    """
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    ask = HfApi().dataset_info if kind == "dataset" else HfApi().model_info
    try:
        ask(name, timeout=_TIMEOUT_S)
    except GatedRepoError as error:
        raise UserError(f"{flag} {name}: this {kind} on the Hub asks for a login first") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{flag} {name}: neither a path here nor a {kind} on the Hub") from error
    except Exception as error:  # the HTTP library's own family of network errors
        return one_line(error)
    return None
