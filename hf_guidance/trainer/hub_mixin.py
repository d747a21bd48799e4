"""Pushes to the Hub: the saved model with its card and figures, without tokens or local paths."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from hf_guidance.trainer.card_mixin import CardMixin
from hf_guidance.trainer.staging import CARD, STAGING, complete, files_in, make_empty, put, remove, stage, without_links
from hf_guidance.trainer.uploads import (
    ARGUMENTS,
    NO_HUB,
    Upload,
    check_may_write,
    of_model,
    one_line,
    push_staged,
    refused,
    stage_checkpoint,
    start_pushing,
    upload_command,
)

logger = logging.getLogger(__name__)


class PublishingMixin(CardMixin):
    """The part of `GuidanceMixin` that pushes the model at every save, and prints a command if a push fails."""

    push_in_progress: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._saved: dict[Path, list[str]] = {}  # folder → files that the last save wrote into it
        super().__init__(*args, **kwargs)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, and check before training that the token may write to it.

        Raises:
            PermissionError: If the Hub does not accept the token, or the token may only read.
            ConnectionError: If the Hub does not answer, or answers with another error.
        """
        before = self.args.hub_private_repo
        self.args.hub_private_repo = before if private is None else private  # earlier Trainers take no `private`
        try:
            super().init_hf_repo(token=token)
        except NO_HUB as error:
            name = str(self.args.hub_model_id or Path(str(self.args.output_dir)).name)
            trained = hasattr(self, "state") and self.state.global_step > 0  # the first call comes before training
            raise refused(name, error, trained=trained) from error
        finally:
            self.args.hub_private_repo = before
        if not self.is_world_process_zero() or self.hub_model_id is None:
            return
        token = token or self.args.hub_token
        check_may_write(self.hub_model_id, token)
        if self.args.hub_revision:
            HfApi().create_branch(self.hub_model_id, branch=self.args.hub_revision, token=token, exist_ok=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push all files of the model; if the push fails, warn and continue training."""
        try:
            self._push_all_of(checkpoint_folder)
        except Exception as error:
            logger.warning("The push of %s failed (%s). Training continues.", checkpoint_folder, one_line(error))

    def _push_all_of(self, checkpoint_folder: str) -> None:
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            if not args.hub_always_push:
                return
            self.push_in_progress.wait_until_done()  # it still reads the files that are written below
        self.callback_handler.on_push_begin(args, self.state, self.control)
        output, checkpoint = Path(str(args.output_dir)), Path(checkpoint_folder)
        model = of_model(self._saved.get(checkpoint, ()))
        for name in model:  # copies, so that a later save does not change the checkpoint
            put(checkpoint / name, output / name, link=False)
        self._try_to_write_a_card()
        staged, message = make_empty(output / STAGING), f"Training in progress, step {self.state.global_step}"
        stage(model, checkpoint, staged)
        complete(staged, output)
        repository: Any = self.hub_model_id  # known since the repository was made
        options: Upload = {"repo_id": repository, "token": args.hub_token, "revision": args.hub_revision}
        pushes: list[tuple[Path, Upload]] = [(staged, {**options, "commit_message": message})]
        places = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        if place := places.get(HubStrategy(args.hub_strategy)):
            resumable = make_empty(output / f"_{checkpoint.name}")  # its own folder, as its state names paths
            stage_checkpoint(checkpoint, model, resumable)
            pushes.append((resumable, {**options, "commit_message": f"{message}, checkpoint", "path_in_repo": place}))
        jobs: Any = start_pushing(*pushes)
        self._say_what_failed()
        self.push_in_progress = PushInProgress(jobs)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._say_what_failed()

    def _say_what_failed(self) -> None:
        current = getattr(self, "push_in_progress", None)
        for job in current.jobs if current is not None else ():
            if job.done() and not job.cancelled() and (error := job.exception()) is not None:
                logger.warning("A push during training failed (%s). The last push uploads everything.", one_line(error))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and remember which files were written: only these are pushed."""
        if not self.args.should_save:
            return super().save_model(output_dir, _internal_call=_internal_call)
        folder = Path(output_dir or str(self.args.output_dir))
        before = files_in(folder)
        super().save_model(output_dir, _internal_call=_internal_call)
        self._saved = {folder: [name for name, stamp in files_in(folder).items() if before.get(name) != stamp]}
        return None

    def stage_push(self) -> Path:
        """Save the model into the output folder, and into a folder inside that holds nothing else.

        Every process must call it. `push_staged` pushes the folder, once there is a card to go with it.
        """
        self._finish_current_push()  # it still reads the files that are written below
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        output = Path(str(self.args.output_dir))
        staged, together = output / STAGING, self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.args.should_save:
            make_empty(staged)
        if together:  # every process may write a part
            self.accelerator.wait_for_everyone()
        self.save_model(str(staged), _internal_call=True)
        if together:
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            without_links(staged, (path.relative_to(staged) for path in staged.rglob("*")))
            for name in files_in(staged):
                put(staged / name, output / name)
            (staged / ARGUMENTS).unlink(missing_ok=True)
        if self.args.should_save and not self.is_world_process_zero():  # on another node, which pushes nothing
            remove(staged)
        return staged

    def _complete(self, staged: Path, private: bool | None, token: str | None, **card: Any) -> None:
        """Create the repository if needed, write the card, and add it to the staged model."""
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        tags = card.pop("tags", None) or []
        tags = [tags] if isinstance(tags, str) else list(tags)
        tags += [tag for tag in getattr(self.model, "model_tags", None) or [] if tag not in tags]
        name = card.pop("model_name", None) or str(self.hub_model_id).split("/")[-1]
        self.create_model_card(model_name=name, **card, **({"tags": tags} if tags else {}))
        complete(staged, Path(str(self.args.output_dir)))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """Push the saved model with its card and figures, and no other file.

        The arguments are those of `Trainer.push_to_hub`.

        Raises:
            ConnectionError: If the push failed. Everything is on disk, and the message has the command to push later.
        """
        output, token = Path(str(self.args.output_dir)), token or self.args.hub_token
        revision = revision or self.args.hub_revision
        staged = self.stage_push()
        if not self.is_world_process_zero():
            return None
        try:
            self._complete(staged, private, token, **card)
            options: Upload = {"commit_message": commit_message, "token": token, "revision": revision}
            options["repo_id"] = str(self.hub_model_id)
            if blocking:
                return push_staged(staged, **options)
            jobs: Any = start_pushing((staged, options))
            self.push_in_progress = PushInProgress(jobs)  # the next push waits for it
            return jobs[0]
        except Exception as error:
            if not (output / CARD).is_file():
                self._try_to_write_a_card()
            complete(staged, output)  # complete the folder whatever failed before
            repository = str(self.hub_model_id or self.args.hub_model_id or output.name)
            is_private = self.args.hub_private_repo if private is None else private
            command = upload_command(repository, staged, revision, is_private)
            raise ConnectionError(
                f"The push to {repository} failed ({type(error).__name__}: {one_line(error)}). Nothing is lost: "
                f"everything is in {output}. To push it later: {command}"
            ) from error
