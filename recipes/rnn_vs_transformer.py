"""An RNN guided by a Transformer, and a Transformer guided by an RNN: the paper's sequence tasks.

    accelerate launch recipes/rnn_vs_transformer.py
    accelerate launch recipes/rnn_vs_transformer.py --task parity --seeds 0 1 2
    accelerate launch recipes/rnn_vs_transformer.py --task language_modeling --text_files shakespeare.txt
    accelerate launch recipes/rnn_vs_transformer.py --use_cpu --claim copy_paste

--claim stands for the flags of a claim of the paper on two CPU cores, with a tuned baseline and five seeds:
copy_paste, copy_paste_decayed, parity or language_modeling (its text: make shakespeare). Beside them stand, on three
seeds, what else may guide the RNN (copy_paste_controls, copy_paste_measures, copy_paste_variants), guidance at the
start only (copy_paste_initialisation), and another pair of layers (language_modeling_early_layer). --config is a file
with flags. A guidance flag with several values (--measure ridge linear_cka) trains each guided run at each of them.

Matched runs (same seed, same initial weights, same data order), chosen with --runs:

    alone                    the target without guidance
    untrained_guide          guided by a guide with random weights
    trained_guide            guided by the network that guide_itself trained
    *_stopped, *_decayed     as untrained_guide or trained_guide, but guidance stops at --stop_step, or decays until it
    *_until_similar          the same, but guidance stops at --stop_similarity
    *_prealigned, *_prealigned_on_noise    the same, but a tenth of the steps is guidance alone, on data or noise
    noncausal_guide          guided by an untrained Transformer that sees the whole row, as in the paper's code
    within_rows              as untrained_guide, but the positions of each row are compared, by debiased CKA
    last_to_early_layer      as trained_guide, but its last layer guides the second one, with a weight that decays
    shuffled_guide           control: the untrained guide sees other rows, of the same length
    noise_guide              control: the untrained guide sees random tokens
    reversed_layers          control: the untrained guide's layers in reverse order
    own_architecture         control: the guide is the target's own architecture, with other random weights
    distillation             the target learns from the trained guide's predictions instead of its layers
    untrained_distillation   the same, of the guide with random weights
    guide_itself             the guide, trained on the task, as a reference

Every field of TrainingArguments and GuidanceConfig is a flag and applies to all runs. Use --seeds instead of --seed,
and --max_steps instead of --num_train_epochs. --output_dir contains a table, results.json, figures, and the model of
each run. Rerun the same command to resume. Results, full commands and hardware: recipes/README.md.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_guidance[recipes]"]
#
# [tool.uv.sources]
# hf_guidance = { path = "..", editable = true }
# ///

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    TrainingArguments,
)

from hf_guidance import load_guide
from hf_guidance.experiments.arguments import INITIALISED, RecipeArguments
from hf_guidance.experiments.command_line import check_choice
from hf_guidance.experiments.distillation import DistillationTrainer
from hf_guidance.experiments.files import identify_files
from hf_guidance.experiments.recipe import launch, training_defaults
from hf_guidance.experiments.recipe_runs import Setup
from hf_guidance.experiments.run import Run
from hf_guidance.targets import RNNConfig, RNNForCausalLM, RNNForSequenceClassification
from hf_guidance.tasks import Task, build_task
from hf_guidance.tasks.blocks import SHUFFLE_BUFFER
from hf_guidance.tasks.parity import length_curriculum

TEXT_TASKS = ("copy_paste", "parity", "language_modeling")
RUNS = ("alone", "untrained_guide", "trained_guide", "guide_itself")  # by default
STOPPED = tuple(f"{guide}_{end}" for guide in ("untrained_guide", "trained_guide") for end in INITIALISED)
VARIANTS = ("noncausal_guide", "within_rows", "last_to_early_layer")
CONTROLS = (
    *("shuffled_guide", "noise_guide", "reversed_layers", "own_architecture", "distillation", "untrained_distillation"),
)
LAYERS = 4  # of the RNNs and the Transformers
OTHER_SEED = 10_000  # of a guide that has the target's architecture, and must not have its weights

FAIR = "--seeds 10 11 12 13 14 --equal_time_baseline --disable_tqdm true"
BESIDE_COPY_PASTE = "--disable_tqdm true --task copy_paste --learning_rate 3e-3 --seeds 20 21 22"
SHAKESPEARE = "outputs/shakespeare.txt"  # of `make shakespeare`
LANGUAGE = f"""
    --disable_tqdm true --task language_modeling --text_files {SHAKESPEARE} --lr_scheduler_type linear
    --guide_learning_rate 2e-3 --guide_max_steps 1000 --guide_rows 16
"""
CLAIMS = {
    "copy_paste": f"""{FAIR}
        --task copy_paste --learning_rates 1e-3 2e-3 3e-3 5e-3 --runs alone untrained_guide untrained_guide_stopped
        --output_dir outputs/claims/copy_paste
    """,
    "copy_paste_decayed": f"""{FAIR} --seeds 30 31 32 33 34
        --task copy_paste --learning_rates 1e-3 2e-3 3e-3 5e-3 --runs alone untrained_guide_decayed
        --output_dir outputs/claims/copy_paste_decayed
    """,
    "copy_paste_controls": f"""{BESIDE_COPY_PASTE}
        --runs alone guide_itself untrained_guide trained_guide own_architecture shuffled_guide noise_guide
        reversed_layers distillation untrained_distillation --output_dir outputs/claims/copy_paste_controls
    """,
    "copy_paste_measures": f"""{BESIDE_COPY_PASTE}
        --runs alone untrained_guide --measure linear_cka debiased_cka ridge ridge_loo procrustes
        --output_dir outputs/claims/copy_paste_measures
    """,
    "copy_paste_variants": f"""{BESIDE_COPY_PASTE}
        --runs alone untrained_guide noncausal_guide within_rows --output_dir outputs/claims/copy_paste_variants
    """,
    "copy_paste_initialisation": f"""{BESIDE_COPY_PASTE} --stop_similarity 0.95
        --runs alone untrained_guide untrained_guide_stopped untrained_guide_decayed untrained_guide_until_similar
        untrained_guide_prealigned untrained_guide_prealigned_on_noise
        --output_dir outputs/claims/copy_paste_initialisation
    """,
    "parity": f"""{FAIR}
        --task parity --learning_rates 3e-4 1e-3 2e-3 3e-3 --runs alone guide_itself trained_guide --guide_rows 24
        --output_dir outputs/claims/parity
    """,
    "language_modeling": f"""{LANGUAGE} --equal_time_baseline --learning_rates 1e-3 2e-3 3e-3 4e-3
        --runs alone guide_itself trained_guide trained_guide_stopped untrained_guide
        --seeds 30 31 32 33 34 --output_dir outputs/claims/language_modeling
    """,
    "language_modeling_early_layer": f"""{LANGUAGE} --learning_rate 2e-3
        --runs alone guide_itself trained_guide last_to_early_layer
        --seeds 40 41 42 --output_dir outputs/claims/language_modeling_early_layer
    """,
}


@dataclass
class Arguments(RecipeArguments):
    """The flags: task, runs and data."""

    task: str = field(default="copy_paste", metadata={"help": f"One of {', '.join(TEXT_TASKS)}."})
    runs: list[str] = field(
        default_factory=lambda: list(RUNS),
        metadata={"help": f"Some of {', '.join(RUNS + STOPPED + VARIANTS + CONTROLS)}."},
    )
    text_files: Optional[list[str]] = field(default=None, metadata={"help": "UTF-8 text files for language_modeling."})
    dataset: str = field(
        default="Salesforce/wikitext", metadata={"help": "Hub id or folder of a dataset that is streamed."}
    )
    dataset_config: str = field(default="wikitext-103-raw-v1", metadata={"help": "Configuration of the dataset."})
    tokenizer: Optional[str] = field(default=None, metadata={"help": "Hub id or folder; by default a BPE is trained."})


@dataclass(frozen=True)
class Preset:
    """The full configuration of one comparison."""

    task: dict[str, Any]
    target: Callable[[Task], PreTrainedModel]
    guide: Callable[[Task], PreTrainedModel]
    training: dict[str, Any]
    guidance: dict[str, Any]
    guide_training: dict[str, Any]
    curriculum: tuple[int, ...] = ()  # length of the longest string in each stage of the guide's training


def recurrent(task: Task, **sizes: Any) -> PreTrainedModel:
    """Build an RNN for the task: a classifier if `sizes` holds `num_labels`, else a language model."""
    if "num_labels" in sizes:
        return RNNForSequenceClassification(RNNConfig(**_tokens(task), **sizes))
    return RNNForCausalLM(RNNConfig(**_tokens(task), **sizes))


def decoder(task: Task, length: int, **sizes: Any) -> PreTrainedModel:
    """Build a GPT-2 language model for texts of up to `length` tokens."""
    own: dict[str, Any] = {
        "n_positions": length,
        "loss_type": "ForCausalLM",
    }  # transformers infers no loss from the name of GPT-2
    return GPT2LMHeadModel(GPT2Config(**_tokens(task), **own, **sizes))


def encoder(task: Task, **sizes: Any) -> PreTrainedModel:
    """Build a ModernBERT classifier."""
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
    own: dict[str, Any] = {"classifier_pooling": "mean", "attn_implementation": "sdpa"}
    try:
        config = ModernBertConfig(**(_tokens(task) | special), **own, **sizes)
    except StrictDataclassFieldValidationError as error:
        raise ValueError(
            f"transformers {transformers.__version__} cannot build a ModernBERT of {sizes['num_hidden_layers']} "
            "layer(s), which parity trains: pip install --upgrade transformers."
        ) from error
    return ModernBertForSequenceClassification(config)


def _tokens(task: Task) -> dict[str, Any]:
    tokenizer = task.processing_class
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return {"vocab_size": len(tokenizer)} | ids


def preset(task: str, size: str) -> Preset:
    """Return the settings of a task, which were tuned on validation data: see recipes/LOG.md."""
    small, of_paper = size == "small", "linear_cka"
    rnn: dict[str, Any]
    transformer: dict[str, Any]
    if task == "copy_paste":
        rnn = {"hidden_size": 128} if small else {"embedding_size": 256, "hidden_size": 512}
        transformer = {"n_embd": 64, "n_head": 4, "n_inner": 128} if small else {"n_embd": 512, "n_head": 16}
        data = {"min_length": 8, "max_length": 15, "eval_size": 2000, "test_size": 5000} if small else {}
        return Preset(
            task=data,
            target=partial(recurrent, num_hidden_layers=LAYERS, **rnn),
            guide=partial(decoder, length=32 if small else 96, n_layer=LAYERS, **transformer),
            training=training_defaults(*((400, 128, 3e-3) if small else (31_300, 256, 1e-3))),
            guidance={"sample_axis": "token", "max_tokens": 256, "measure": "ridge"}
            if small
            else {"measure": of_paper},
            guide_training={},
        )
    if task == "parity":
        width = 64 if small else 512
        return Preset(
            task={"max_length": 20, "eval_size": 2000, "test_size": 5000} if small else {},
            target=partial(
                encoder,
                num_labels=2,
                num_hidden_layers=1,
                hidden_size=width,
                intermediate_size=2 * width,
                num_attention_heads=width // 16,
            ),
            guide=partial(recurrent, num_labels=2, num_hidden_layers=1, hidden_size=width),
            training=training_defaults(1500 if small else 31_300, 256, 1e-3),
            guidance={"sample_axis": "token", "max_tokens": 512, "measure": "ridge" if small else of_paper},
            guide_training={"max_grad_norm": 1.0, "learning_rate": 1e-3},
            curriculum=(5, 10, 20) if small else (5, 10, 20, 50),
        )
    rnn = {"hidden_size": 256} if small else {"embedding_size": 256, "hidden_size": 512}
    transformer = {"n_embd": 128, "n_head": 4} if small else {"n_embd": 512, "n_head": 16}
    return Preset(
        task={"block_size": 32, "max_eval_blocks": 512} if small else {"block_size": 50, "vocab_size": 32_000},
        target=partial(recurrent, num_hidden_layers=LAYERS, **rnn),
        guide=partial(decoder, length=64, n_layer=LAYERS, **transformer),
        training=training_defaults(*((300, 64, 2e-3) if small else (60_000, 256, 1e-3))) | {"max_grad_norm": 0.25},
        guidance={"sample_axis": "token", "max_tokens": 512, "measure": "ridge" if small else of_paper},
        guide_training={"max_steps": 1000} if small else {},
    )


def defaults(recipe: Arguments) -> dict[str, Any]:
    """Return the defaults of the other flags."""
    check_choice("task", recipe.task, TEXT_TASKS)
    for run in recipe.runs:
        check_choice("runs", run, RUNS + STOPPED + VARIANTS + CONTROLS)
    if recipe.task == "parity" and (wrong := [run for run in recipe.runs if run in VARIANTS]):
        raise ValueError(f"--runs {wrong[0]} compares the layers of a Transformer guide, but parity's guide is an RNN.")
    chosen = preset(recipe.task, recipe.preset)
    folder = f"outputs/rnn_vs_transformer/{recipe.task}-{recipe.preset}"
    return {"output_dir": folder, **chosen.training, **chosen.guidance}


def build(recipe: Arguments, args: TrainingArguments) -> Setup:
    """Build data and runs from the flags."""
    chosen = preset(recipe.task, recipe.preset)
    options = dict(chosen.task)
    if recipe.task == "language_modeling":
        if SHAKESPEARE in (recipe.text_files or ()) and not Path(SHAKESPEARE).is_file():
            raise ValueError(f"--text_files {SHAKESPEARE} is not there: `make shakespeare` downloads it.")
        names = ("text_files", "dataset", "dataset_config", "tokenizer")
        options |= {name: getattr(recipe, name) for name in names}
        options |= {"max_eval_blocks": recipe.eval_size} if recipe.eval_size else {}
    elif recipe.eval_size:
        options |= {"eval_size": recipe.eval_size, "test_size": recipe.eval_size}
    task = build_task(recipe.task, **options)
    files = {"text_files": identify_files(recipe.text_files)} if recipe.text_files else {}
    return Setup(
        task=task,
        data={"task": recipe.task, **options, **files},
        target=partial(chosen.target, task),
        runs=partial(matched_runs, recipe, args, chosen, task),
        train_dataset=partial(in_order_of, task),
    )


def in_order_of(task: Task, seed: int) -> Any:
    """Return the training rows. A stream, which has no sampler, is shuffled by the seed."""
    rows = task.train_dataset
    return rows if hasattr(rows, "__len__") else rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)


def matched_runs(recipe: Arguments, args: TrainingArguments, chosen: Preset, task: Task, seed: int) -> list[Run]:
    """Return the runs of one seed, in an order that trains the guide before it is needed."""
    target, guide = partial(chosen.target, task), partial(chosen.guide, task)
    own = chosen.guide_training | recipe.guide_training()
    own_task = None
    if chosen.curriculum:
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        rows = length_curriculum(
            task.train_dataset, chosen.curriculum, own.get("max_steps", args.max_steps) * batch, seed
        )
        own_task = replace(task, train_dataset=rows)
        own["train_sampling_strategy"] = "sequential"
    trained = Path(str(args.output_dir)) / f"seed-{seed}" / "guide_itself"

    def untrained() -> Any:
        return load_guide(guide().config, seed=seed)

    def own_architecture() -> Any:
        return load_guide(target().config, seed=OTHER_SEED + seed)

    def noncausal() -> Any:
        own = guide().config  # a GPT-2's
        sizes = {"hidden_size": own.n_embd, "intermediate_size": own.n_inner or 4 * own.n_embd}
        return load_guide(
            encoder(task, num_hidden_layers=own.n_layer, num_attention_heads=own.n_head, **sizes).config, seed=seed
        )

    given: Callable[..., Any] = partial(load_guide, trained)
    head = AutoModelForSequenceClassification if recipe.task == "parity" else AutoModelForCausalLM

    def distil(teacher: Callable[[], Any], **kwargs: Any) -> DistillationTrainer:
        return DistillationTrainer(guide=teacher(), **kwargs)

    last, within = f"hidden_states.1~hidden_states.{LAYERS - 1}", {"sample_axis": "within", "measure": "debiased_cka"}
    early = {"layer_pairs": [last], "guidance_schedule": "linear"}
    runs = [
        Run("alone", seed, target),
        Run("guide_itself", seed, guide, training=own, task=own_task),
        Run("untrained_guide", seed, target, guide=untrained),
        Run("trained_guide", seed, target, guide=given, needs="guide_itself", like=untrained),
        Run("noncausal_guide", seed, target, guide=noncausal),
        Run("within_rows", seed, target, guide=untrained, guidance=within),
        Run("last_to_early_layer", seed, target, guide=given, needs="guide_itself", like=untrained, guidance=early),
        Run("shuffled_guide", seed, target, guide=untrained, guidance={"guide_input": "shuffled"}),
        Run("noise_guide", seed, target, guide=untrained, guidance={"guide_input": "noise"}),
        Run("reversed_layers", seed, target, guide=untrained, guidance={"layer_mapping": "reversed"}),
        Run("own_architecture", seed, target, guide=own_architecture),
        Run(
            "distillation", seed, target, trainer=partial(distil, partial(given, auto_class=head)), needs="guide_itself"
        ),
        Run("untrained_distillation", seed, target, trainer=partial(distil, guide)),
    ]
    by_name = {run.name: run for run in runs}
    runs += [
        replace(by_name[name], name=f"{name}{end}", guidance=fields)
        for name in ("untrained_guide", "trained_guide")
        for end, fields in recipe.initialisations(recipe.runs, args.max_steps).items()
    ]
    needed = {*recipe.runs, *(run.needs for run in runs if run.name in recipe.runs)}
    return [run for run in runs if run.name in needed]


if __name__ == "__main__":
    launch(__doc__ or "", Arguments, defaults, build, CLAIMS)
