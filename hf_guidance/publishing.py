"""What leaves the machine: pushes to the Hub with card and code, and without token or path."""

from __future__ import annotations

import inspect
import logging
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils.hub import PushInProgress
from transformers.utils.import_utils import is_matplotlib_available

from hf_guidance.analysis.curves import plot_run
from hf_guidance.card_facts import EMISSIONS, given_facts, run_facts
from hf_guidance.model_card import render
from hf_guidance.scrub import scrub_arguments, scrub_state

logger = logging.getLogger(__name__)

ARGUMENTS = "training_args.bin"
CURVES = "curves.png"
STATE = "trainer_state.json"
# in a checkpoint, for going on with the training, and no part of the model
FOR_RESUMING = ("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "global_step*", "latest", "zero_to_fp32.py")
# beside the model: a pickle, the place and the name of the machine, paths, the guide, a cache of its features
NOT_PUSHED = ["_*", f"{PREFIX_CHECKPOINT_DIR}-*", ARGUMENTS, EMISSIONS, STATE, "runs/*", "guide/*", "*rows.bin"]


class PublishingMixin(Trainer if TYPE_CHECKING else object):  # type: ignore[misc]
    """The part of `GuidanceMixin` that saves for others to see: card, code, scrubbed arguments, pushes.

    Attributes:
        card_facts: what the card is to say beside what the trainer knows; see `run_facts`.
        resumed: whether a call of `train` went on from a checkpoint.
    """

    guide: Any
    guidance: Any
    push_in_progress: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.card_facts: dict[str, Any] = {}
        self.resumed = False
        super().__init__(*args, **kwargs)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; a resume is kept in mind, as the time that is logged is then that of the last part."""
        self.resumed = self.resumed or bool(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As transformers', which says nothing of a token that may not write until training is over.

        Raises:
            PermissionError: the token may only read.
        """
        super().init_hf_repo(token=token, private=private)
        if not self.is_world_process_zero() or self.hub_model_id is None:
            return
        token = token or self.args.hub_token
        check_may_write(self.hub_model_id, token)
        if self.args.hub_revision:
            HfApi().create_branch(self.hub_model_id, branch=self.args.hub_revision, token=token, exist_ok=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card to ``<output_dir>/README.md``; without a guide, transformers' own.

        Args:
            language, license, tags, model_name, dataset, dataset_tags, finetuned_from: as of
                `Trainer.create_model_card`.
        """
        if self.guide is None and not self.card_facts:
            return super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return None
        folder = Path(str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        given = given_facts(**kwargs)
        given |= {name: value for name, value in self.card_facts.items() if not given.get(name)}
        if self._drew_curves(folder / CURVES):
            given["figures"] = [{"file": CURVES, "caption": "Task loss, validation, and similarity of every pair"}]
        (folder / "README.md").write_text(render(run_facts(self, **given)), encoding="utf-8")
        return None

    def _drew_curves(self, path: Path) -> bool:
        """Draw the run's curves, where matplotlib is installed; whether they are there."""
        if not is_matplotlib_available():
            return False
        try:
            return plot_run(self.state.log_history, path, self.guidance.measure if self.guide is not None else None)
        except Exception:  # a card without a figure is better than none
            logger.exception("The training curves could not be drawn.")
            return False

    def _try_to_write_a_card(self) -> None:
        try:
            self.create_model_card(model_name=(self.hub_model_id or "").split("/")[-1] or None)
        except Exception:  # training goes on, and what is trained is kept, whatever ails a card
            logger.exception("The model card could not be written; everything else was.")

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # transformers' own holds token and paths in clear
            torch.save(scrub_arguments(self.args), Path(output_dir or str(self.args.output_dir)) / ARGUMENTS)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As transformers', with all that belongs to the model; a push that fails is said, and training goes on."""
        try:
            self._push_all_of(checkpoint_folder)
        except Exception as error:
            logger.warning("The push of %s failed (%s); training goes on.", checkpoint_folder, _one_line(error))

    def _push_all_of(self, checkpoint_folder: str) -> None:
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        output, checkpoint = Path(str(args.output_dir)), Path(checkpoint_folder)
        state = shutil.ignore_patterns(*FOR_RESUMING, STATE, ARGUMENTS)
        shutil.copytree(checkpoint, output, ignore=state, dirs_exist_ok=True)
        self._try_to_write_a_card()
        message = f"Training in progress, step {self.state.global_step}"
        options: dict[str, Any] = {"repo_id": self.hub_model_id, "token": args.hub_token, "run_as_future": True}
        options["revision"] = args.hub_revision
        api = HfApi()
        jobs: list[Any] = [
            api.upload_folder(folder_path=output, commit_message=message, ignore_patterns=self._left_out(), **options)
        ]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            whole = output / f"_{checkpoint.name}"  # a copy, as the run goes on and its state names paths
            shutil.copytree(checkpoint, whole, ignore=shutil.ignore_patterns(ARGUMENTS), dirs_exist_ok=True)
            scrub_state(whole / STATE)
            last = args.hub_strategy == HubStrategy.CHECKPOINT
            jobs.append(
                api.upload_folder(
                    folder_path=whole,
                    path_in_repo="last-checkpoint" if last else checkpoint.name,
                    commit_message=f"{message}, checkpoint",
                    **options,
                )
            )
            jobs[-1].add_done_callback(lambda _: shutil.rmtree(whole, ignore_errors=True))
        if busy and self.push_in_progress is not None:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self._say_what_failed()
            self.push_in_progress = PushInProgress(jobs)  # type: ignore[arg-type]

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._say_what_failed()

    def _say_what_failed(self) -> None:
        current = getattr(self, "push_in_progress", None)
        for job in current.jobs if current is not None else ():
            if job.done() and not job.cancelled() and (error := job.exception()) is not None:
                logger.warning("A push during training failed (%s); the last one brings all.", _one_line(error))

    def _left_out(self) -> list[str]:
        """Patterns of the files in the output folder that no push takes along."""
        cache, output = self.guidance.cache_guide if self.guide is not None else None, str(self.args.output_dir)
        if cache is None or not (place := Path(cache).resolve()).is_relative_to(Path(output).resolve()):
            return NOT_PUSHED
        inside = place.relative_to(Path(output).resolve()).as_posix()
        return NOT_PUSHED if inside == "." else [*NOT_PUSHED, f"{inside}/*"]

    def _push_the_last(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        token = token or self.args.hub_token
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        of_model, tags = getattr(self.model, "model_tags", None) or [], card.pop("tags", None) or []
        tags = [tags] if isinstance(tags, str) else list(tags)
        tags += [tag for tag in of_model if tag not in tags]
        name = card.pop("model_name", None) or str(self.hub_model_id).split("/")[-1]
        self.create_model_card(model_name=name, **card, **({"tags": tags} if tags else {}))
        self._finish_current_push()
        upload: Any = HfApi().upload_folder
        return upload(
            repo_id=str(self.hub_model_id),
            folder_path=str(self.args.output_dir),
            commit_message=commit_message,
            token=token,
            ignore_patterns=self._left_out(),
            revision=revision or self.args.hub_revision,
            run_as_future=not blocking,
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', without what does not belong to the model.

        Raises:
            ConnectionError: the push failed; everything is on disk, and the message has the command to push it later.
        """
        try:
            return self._push_the_last(*args, **kwargs)
        except Exception as error:
            folder = Path(str(self.args.output_dir))
            if not (folder / "README.md").is_file():
                self._try_to_write_a_card()
            repository = self.hub_model_id or self.args.hub_model_id or folder.name
            command = later(str(repository), folder, self.args.hub_revision, self._left_out())
            raise ConnectionError(
                f"The push to {repository} failed ({type(error).__name__}: {_one_line(error)}). Nothing is lost: all "
                f"of it is in {folder}. To push it later: {command}"
            ) from error


def check_may_write(repository: str, token: str | None) -> None:
    """Raise PermissionError if the Hub says that this token may not push to the repository."""
    api = HfApi()
    if "write" not in inspect.signature(api.auth_check).parameters:  # an older client cannot ask
        return
    try:
        api.auth_check(repository, token=token, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise PermissionError(
                f"The token may not write to {repository} ({_one_line(error)}). Nothing was trained: log in with a "
                "token that has write access (`hf auth login`), pass hub_token, or name a repository of your own by "
                "hub_model_id."
            ) from error


def later(repository: str, folder: Path, revision: str | None = None, left_out: Sequence[str] = NOT_PUSHED) -> str:
    """The command that pushes a saved model."""
    words = ["hf", "upload", repository, str(folder), "."]
    words += ["--revision", revision] if revision else []
    return shlex.join(words + [word for pattern in left_out for word in ("--exclude", pattern)])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
