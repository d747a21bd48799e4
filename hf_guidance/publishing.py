"""What leaves the machine: pushes to the Hub with card and code, and without token or path."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from hf_guidance.card_writing import CardMixin
from hf_guidance.uploads import (
    ARGUMENTS,
    FOR_RESUMING,
    NO_HUB,
    STATE,
    check_may_write,
    later,
    left_out,
    one_line,
    refused,
    start_pushing,
)

logger = logging.getLogger(__name__)


class PublishingMixin(CardMixin):
    """The part of `GuidanceMixin` that pushes: the whole model at every save, and a command when it cannot."""

    push_in_progress: Any

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As transformers', which says nothing of a token that may not write until training is over.

        Raises:
            PermissionError: the Hub does not know the token, or it may only read.
            ConnectionError: the Hub does not answer, or not as it should.
        """
        try:
            super().init_hf_repo(token=token, private=private)
        except NO_HUB as error:
            name = str(self.args.hub_model_id or Path(str(self.args.output_dir)).name)
            trained = hasattr(self, "state") and self.state.global_step > 0  # the first call is before there is any
            raise refused(name, error, trained=trained) from error
        if not self.is_world_process_zero() or self.hub_model_id is None:
            return
        token = token or self.args.hub_token
        check_may_write(self.hub_model_id, token)
        if self.args.hub_revision:
            HfApi().create_branch(self.hub_model_id, branch=self.args.hub_revision, token=token, exist_ok=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As transformers', with all that belongs to the model; a push that fails is said, and training goes on."""
        try:
            self._push_all_of(checkpoint_folder)
        except Exception as error:
            logger.warning("The push of %s failed (%s); training goes on.", checkpoint_folder, one_line(error))

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
        state = shutil.ignore_patterns(*FOR_RESUMING, STATE, ARGUMENTS)
        shutil.copytree(checkpoint, output, ignore=state, dirs_exist_ok=True)
        self._try_to_write_a_card()
        places = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        place = places.get(HubStrategy(args.hub_strategy))
        jobs: list[Any] = start_pushing(
            output,
            f"Training in progress, step {self.state.global_step}",
            self._left_out(),
            resumable=(checkpoint, place) if place else None,
            repo_id=self.hub_model_id,
            token=args.hub_token,
            revision=args.hub_revision,
        )
        self._say_what_failed()
        self.push_in_progress = PushInProgress(jobs)  # type: ignore[arg-type]

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._say_what_failed()

    def _say_what_failed(self) -> None:
        current = getattr(self, "push_in_progress", None)
        for job in current.jobs if current is not None else ():
            if job.done() and not job.cancelled() and (error := job.exception()) is not None:
                logger.warning("A push during training failed (%s); the last one brings all.", one_line(error))

    def _left_out(self) -> list[str]:
        cache = self.guidance.cache_guide if self.guide is not None else None
        return left_out(Path(str(self.args.output_dir)), cache)

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
        self._finish_current_push()  # it reads the files that are written below
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
            revision = kwargs.get("revision") or self.args.hub_revision
            command = later(str(repository), folder, revision, self._left_out())
            raise ConnectionError(
                f"The push to {repository} failed ({type(error).__name__}: {one_line(error)}). Nothing is lost: all "
                f"of it is in {folder}. To push it later: {command}"
            ) from error
