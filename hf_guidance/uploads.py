"""The uploads to the Hub: what stays behind, whether the token may write, and how to push later."""

from __future__ import annotations

import inspect
import shlex
import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError  # of the library that the client speaks through, and its own
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_guidance.card_facts import EMISSIONS
from hf_guidance.scrub import scrub_state

NO_HUB = (HTTPError, ConnectionError)  # it refuses, or is not reached; the second when HF_HUB_OFFLINE says so
ARGUMENTS = "training_args.bin"
STATE = "trainer_state.json"
# in a checkpoint, for going on with the training, and no part of the model
FOR_RESUMING = ("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "global_step*", "latest", "zero_to_fp32.py")
# beside the model: a pickle, the place and the name of the machine, paths, the guide, a cache of its features
NOT_PUSHED = ["_*", f"{PREFIX_CHECKPOINT_DIR}-*", ARGUMENTS, EMISSIONS, STATE, "runs/*", "guide/*", "*rows.bin"]
# and what others may have left there: hidden files, logs, pickled weights
NOT_PUSHED += [".*", "*.log", "*tfevents*", "wandb/*", "mlruns/*", "pytorch_model*.bin", "*.pkl", "*.pickle", "*.ckpt"]


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


def left_out(output: Path, cache: str | None) -> list[str]:
    """Patterns of the files in the output folder that no push takes along.

    Args:
        cache: where the guide's features are kept, wherever that is.
    """
    if cache is None or not (place := Path(cache).resolve()).is_relative_to(output.resolve()):
        return list(NOT_PUSHED)
    inside = place.relative_to(output.resolve()).as_posix()
    return list(NOT_PUSHED) if inside == "." else [*NOT_PUSHED, f"{inside}/*"]


def start_pushing(
    output: Path, message: str, ignore: Sequence[str], *, resumable: tuple[Path, str] | None = None, **options: Any
) -> list[Future[Any]]:
    """Begin to push the model, and after it what is needed to go on with its training.

    Args:
        output: the folder of the model.
        message: of the commit.
        ignore: patterns of files in it that stay.
        resumable: a checkpoint's folder and its place in the repository.
        **options: of `HfApi.upload_folder`: ``repo_id``, ``token``, ``revision``.

    Returns:
        The uploads that have begun.
    """
    api, options = HfApi(), options | {"run_as_future": True}
    jobs: list[Future[Any]] = [
        api.upload_folder(folder_path=output, commit_message=message, ignore_patterns=list(ignore), **options)
    ]
    if resumable is not None:
        checkpoint, place = resumable
        whole = output / f"_{checkpoint.name}"  # a copy, as the run goes on and its state names paths
        shutil.copytree(checkpoint, whole, ignore=shutil.ignore_patterns(ARGUMENTS), dirs_exist_ok=True)
        scrub_state(whole / STATE)
        title = f"{message}, checkpoint"
        jobs.append(api.upload_folder(folder_path=whole, path_in_repo=place, commit_message=title, **options))
        jobs[-1].add_done_callback(lambda _: shutil.rmtree(whole, ignore_errors=True))
    return jobs


def later(repository: str, folder: Path, revision: str | None = None, left_out: Sequence[str] = NOT_PUSHED) -> str:
    """The command that pushes a saved model."""
    words = ["hf", "upload", repository, str(folder.resolve()), "."]  # from wherever that is typed
    words += ["--revision", revision] if revision else []
    return shlex.join(words + [word for pattern in left_out for word in ("--exclude", pattern)])


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
