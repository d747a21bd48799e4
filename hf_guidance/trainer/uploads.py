"""Uploads to the Hub: which files, whether the token may write, and the command to push later."""

from __future__ import annotations

import inspect
import re
import shlex
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HTTPError  # of the HTTP library and of the client itself
from transformers import TrainingArguments

from hf_guidance.card.redaction import scrub_state
from hf_guidance.card.settings_redaction import scrub_settings
from hf_guidance.trainer.checkpoints import ORIGIN, STATE
from hf_guidance.trainer.staging import CARD, files_in, stage

if TYPE_CHECKING:
    from typing_extensions import Unpack

ARGUMENTS = "training_args.bin"
NO_HUB = (HTTPError, ConnectionError)  # refused or unreachable; ConnectionError with HF_HUB_OFFLINE
# files of a checkpoint that serve only to resume training
FOR_RESUMING = (
    *(r"optimizer\.(pt|bin)", r"scheduler\.pt", r"scaler\.pt", re.escape(STATE), re.escape(ORIGIN)),
    *(r"rng_state(_\d+)?\.pth", r"pytorch_model_fsdp\.bin", r"latest", r"zero_to_fp32\.py"),
    r"(optimizer|pytorch_model_fsdp)_\d+/(\.metadata|__\d+_\d+\.distcp)",  # FSDP's shards
    r"global_step\d+/\w+_states\.pt",  # DeepSpeed's
)


class Upload(TypedDict, total=False):
    """Options of `HfApi.upload_folder`."""

    repo_id: str
    commit_message: str | None
    token: str | None
    revision: str | None
    path_in_repo: str


def check_may_write(repository: str, token: str | None) -> None:
    """Raise PermissionError if the Hub says that this token may not push to the repository."""
    api = HfApi()
    if "write" not in inspect.signature(api.auth_check).parameters:  # an older client cannot ask
        return
    try:
        api.auth_check(repository, token=token, write=True)
    except NO_HUB as error:
        if _says_no(error):
            raise refused(repository, error) from error


def check_hub(args: TrainingArguments) -> None:
    """Create the repository if needed, and check that the token may write to it.

    Raises:
        PermissionError: If the Hub does not accept the token, or the token may only read.
        ConnectionError: If the Hub does not answer, or answers with another error.
    """
    name, token = str(args.hub_model_id), args.hub_token
    try:
        made = HfApi().create_repo(name, token=token, private=args.hub_private_repo, exist_ok=True)
    except NO_HUB as error:
        raise refused(name, error) from error
    check_may_write(made.repo_id, token)


def _says_no(error: Exception) -> bool:
    return getattr(getattr(error, "response", None), "status_code", None) in (401, 403)


def refused(repository: str, error: Exception, trained: bool = False) -> OSError:
    """Make the error to raise if the Hub refuses to create a repository or to write to it."""
    nothing = "" if trained else "Nothing was trained: "
    if not _says_no(error):
        return ConnectionError(
            f"The Hub does not answer as expected for {repository} ({one_line(error)}). {nothing}try "
            f"again{'.' if trained else ', or train without push_to_hub and push later.'}"
        )
    return PermissionError(
        f"The token may not write to {repository} ({one_line(error)}). {nothing}log in with a token that "
        "has write access (`hf auth login`), pass hub_token, or set hub_model_id to a repository of your own."
    )


def of_model(names: Iterable[str]) -> list[str]:
    """Select the saved files that belong to the model, without training arguments and files for resuming."""
    return [name for name in names if name != ARGUMENTS and not for_resuming(name)]


def for_resuming(name: str) -> bool:
    """Tell whether a file of a checkpoint serves only to resume training, and is not part of the model."""
    return any(re.fullmatch(pattern, name) for pattern in FOR_RESUMING)


def stage_checkpoint(checkpoint: Path, model: Sequence[str], staged: Path) -> None:
    """Put all that resuming needs into an empty folder: the model, and the files for resuming."""
    names = [name for name in files_in(checkpoint) if (name in model and name != CARD) or for_resuming(name)]
    stage(names, checkpoint, staged)
    scrub_state(staged / STATE)
    scrub_settings(staged, checkpoint.parent)


def push_staged(staged: Path, **options: Unpack[Upload]) -> CommitInfo:
    """Upload a staged folder, and remove it after all files have arrived.

    Args:
        staged: The folder.
        **options: Arguments of `HfApi.upload_folder`.
    """
    pushed: CommitInfo = HfApi().upload_folder(folder_path=staged, **options)
    shutil.rmtree(staged, ignore_errors=True)
    return pushed


def start_pushing(*staged: tuple[Path, Upload]) -> list[Future[CommitInfo]]:
    """Begin to push staged folders one after the other, each with its own options.

    Returns:
        The uploads that have begun.
    """
    api = HfApi()
    return [api.run_as_future(push_staged, folder, **options) for folder, options in staged]


def upload_command(repository: str, staged: Path, revision: str | None = None, private: bool | None = None) -> str:
    """Return the command that pushes a staged folder. It creates a private repository if asked to."""
    words = ["hf", "upload", repository, str(staged.resolve()), "."]  # works from any folder
    words += ["--revision", revision] if revision else []
    return shlex.join(words + (["--private"] if private else []))


def one_line(error: Exception) -> str:
    """Return the message of an error on one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]
