"""The uploads to the Hub: what goes up, whether the token may write, and how to push later."""

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
from huggingface_hub.errors import HTTPError  # of the library that the client speaks through, and its own
from transformers import TrainingArguments

from hf_guidance.card.redaction import scrub_state
from hf_guidance.card.settings_redaction import scrub_settings
from hf_guidance.trainer.checkpoints import ORIGIN, STATE
from hf_guidance.trainer.staging import CARD, files_in, stage

if TYPE_CHECKING:
    from typing_extensions import Unpack

ARGUMENTS = "training_args.bin"
NO_HUB = (HTTPError, ConnectionError)  # it refuses, or is not reached; the second when HF_HUB_OFFLINE says so
# in a checkpoint, for going on with the training, and no part of the model
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
    """Make the repository that is to be pushed to, if there is none, and see that the token may write to it.

    Raises:
        PermissionError: the Hub does not know the token, or it may only read.
        ConnectionError: the Hub does not answer, or not as it should.
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
    """What to raise where the Hub does not let a repository be made or written to, before any training or after it."""
    nothing = "" if trained else "Nothing was trained: "
    if not _says_no(error):
        return ConnectionError(
            f"The Hub does not answer as it should for {repository} ({one_line(error)}). {nothing}try "
            f"again{'.' if trained else ', or train without push_to_hub and push later.'}"
        )
    return PermissionError(
        f"The token may not write to {repository} ({one_line(error)}). {nothing}log in with a token that "
        "has write access (`hf auth login`), pass hub_token, or name a repository of your own by hub_model_id."
    )


def of_model(names: Iterable[str]) -> list[str]:
    """Those of the files that saving wrote which belong to the model: not the arguments, and nothing for resuming."""
    return [name for name in names if name != ARGUMENTS and not for_resuming(name)]


def for_resuming(name: str) -> bool:
    """Whether a checkpoint has a file for going on with the training, and not as a part of the model."""
    return any(re.fullmatch(pattern, name) for pattern in FOR_RESUMING)


def stage_checkpoint(checkpoint: Path, model: Sequence[str], staged: Path) -> None:
    """Put what is needed to go on with a training into an empty folder: the model, and the files for resuming."""
    names = [name for name in files_in(checkpoint) if (name in model and name != CARD) or for_resuming(name)]
    stage(names, checkpoint, staged)
    scrub_state(staged / STATE)
    scrub_settings(staged, checkpoint.parent)


def push_staged(staged: Path, **options: Unpack[Upload]) -> CommitInfo:
    """Upload a staged folder, which is removed when all of it has arrived.

    Args:
        **options: of `HfApi.upload_folder`.
    """
    pushed: CommitInfo = HfApi().upload_folder(folder_path=staged, **options)
    shutil.rmtree(staged, ignore_errors=True)
    return pushed


def start_pushing(*staged: tuple[Path, Upload]) -> list[Future[CommitInfo]]:
    """Begin to push staged folders, one after the other, each with options of its own; the uploads that have begun."""
    api = HfApi()
    return [api.run_as_future(push_staged, folder, **options) for folder, options in staged]


def later(repository: str, staged: Path, revision: str | None = None, private: bool | None = None) -> str:
    """The command that pushes a staged folder, to a private repository if there is none yet and it is to be one."""
    words = ["hf", "upload", repository, str(staged.resolve()), "."]  # from wherever that is typed
    words += ["--revision", revision] if revision else []
    return shlex.join(words + (["--private"] if private else []))


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
