"""Errors of the Hub and of the way to it, told apart from those of a source, in words that say what to do."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HTTPError,  # of the HTTP library and of the client itself
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

LOG_IN = "log in (`hf auth login`), or pass token"
TRY_AGAIN = "try again later. With HF_HUB_OFFLINE=1, what this machine has loaded before is read without the Hub"
OFFLINE = (
    "it is no folder here, and not among what this machine has loaded from the Hub before, which is not asked: unset "
    "HF_HUB_OFFLINE (and local_files_only) to load it."
)
REMEDIES = {
    401: "it does not accept the token: log in anew (`hf auth login`), or pass another token",
    403: "this user may not read it: log in as one who may (`hf auth login`), or pass token",
    429: f"these are too many requests. Wait some minutes, or {LOG_IN}: it allows more to those it knows",
}


def hub_fault(name: str, error: BaseException) -> str | None:
    """Explain an error that is the Hub's, or of the way to it.

    Args:
        name: Hub id that was asked for.
        error: The error, whose causes are looked at too.

    Returns:
        What the Hub answered and what to do about it; None for any other error.
    """
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, GatedRepoError):
            return f"the Hub gives access on request: ask for it at {constants.ENDPOINT}/{name}, then {LOG_IN}."
        if isinstance(cause, RepositoryNotFoundError):
            return f"it is no folder here, and no repository that this user may read. For a private one {LOG_IN}."
        if isinstance(cause, OfflineModeIsEnabled):
            return OFFLINE
        if isinstance(cause, RevisionNotFoundError) or _has_no_such_file(cause):
            return None
        if isinstance(cause, (HTTPError, ConnectionError)):
            if (response := getattr(cause, "response", None)) is None:
                return f"the Hub ({constants.ENDPOINT}) cannot be reached ({one_line(cause)}): {TRY_AGAIN}."
            answer = f"{response.status_code} {response.reason_phrase}"
            return f"the Hub answered {answer}: {REMEDIES.get(response.status_code, TRY_AGAIN)}."
    return OFFLINE if any(isinstance(cause, LocalEntryNotFoundError) for cause in causes) else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _has_no_such_file(error: BaseException) -> bool:
    return isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)


def one_line(error: BaseException) -> str:
    """Return what an error says on one line of at most 300 characters; its type, if it says nothing."""
    return textwrap.shorten(str(error), 300).rstrip(".") or type(error).__name__
