"""The command line in cards and results: known settings survive word for word, and nothing else is published."""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import pytest
from transformers import TrainingArguments

from hf_guidance import GuidanceConfig
from hf_guidance.card import redaction
from hf_guidance.card.command import published_command

# what must not appear stands between ⟨ and ⟩; most are flags of a script `python train.py`
HOSTILE = """
--header 'Authorization: Bearer ⟨abc.def⟩'
--header=Authorization:⟨Basic⟩
-H 'X-Api-Key: ⟨s3cr3t⟩'
-H'X-Api-Key:⟨s3cr3t⟩'
--cookie 'session=⟨s3cr3t⟩; path=/'
--cookies ⟨sessionid⟩
-b session=⟨s3cr3t⟩
--url https://s3.example.org/b/f?X-Amz-Signature=⟨s3cr3t⟩
--data 'https://x.blob.core.windows.net/c/f?sv=2024&sig=⟨s3cr3t⟩'
--dataset https://storage.googleapis.com/b/f?GoogleAccessId=⟨me⟩
--dataset https://⟨alice⟩:⟨hunter2⟩@host.org/x
--dataset s3://⟨bucket⟩/data
--dataset ⟨alice⟩@host.org:data
--data_url git+ssh://⟨git@host⟩/x
--proxy http://⟨alice:pw⟩@proxy:8080
--index-url https://__token__:⟨pw⟩@pypi.org/simple
--wandb-key ⟨abc⟩
--wandb_key=⟨abc⟩
--wandb_api_key ⟨abc⟩
--api-key ⟨abc⟩
--openai ⟨sk-abc⟩
--aws_secret_access_key ⟨abc⟩
--aws_access_key_id ⟨AKIAIOSFODNN7EXAMPLE⟩
--password ⟨hunter2⟩
--pw ⟨hunter2⟩
--passphrase=⟨hunter2⟩
--user ⟨alice⟩ --pass ⟨hunter2⟩
-p ⟨hunter2⟩
-p⟨hunter2⟩
-p=⟨hunter2⟩
-u⟨alice⟩:⟨hunter2⟩
-o⟨/home/alice⟩/out
-k ⟨sk-abc⟩
⟨sk-abcdefghijkl⟩
⟨ghp_abcdefghijkl⟩
⟨hf_abcdefghijkl⟩
⟨xoxb-1-2-abc⟩
⟨hunter2⟩
run ⟨hunter2⟩ --seed 1
HF_TOKEN=⟨hf_abc⟩
env WANDB_API_KEY=⟨abc⟩
--env HF_TOKEN=⟨hf_abc⟩
--env=⟨HF_TOKEN⟩
--config '{"hub_token": "⟨abc⟩"}'
'--config={"lr": 1, "db": "⟨abc⟩"}'
'{"hub_token": "⟨abc⟩"}'
--deepspeed '{"comms": "⟨abc⟩"}'
'--fsdp_config={"x": "⟨abc⟩"}'
--accelerator_config '{"x": "⟨abc⟩"}'
--accelerator_config ⟨abc⟩
--lr_scheduler_kwargs ⟨abc⟩
--gradient_checkpointing_kwargs '{"x": "⟨abc⟩"}'
--parallelism_config ⟨abc⟩
--liger_kernel_config ⟨abc⟩
--optim_args token=⟨abc⟩
--optim_args ⟨hunter2⟩
--optim-args=⟨hunter2⟩
--run_name ⟨client-acme⟩
--run-name=⟨client-acme⟩
--project ⟨client-acme⟩
--trackio_space_id ⟨acme/space⟩
--trackio-bucket-id ⟨acme/bucket⟩
--logging_dir ⟨/mnt/acme⟩/logs
--logging_dir=⟨acme⟩
--hub_token ⟨abc⟩
--hub_token=⟨abc⟩
--hub-token ⟨abc⟩
--push_to_hub_token ⟨abc⟩
--hub_tok ⟨abc⟩
--hub_tok=⟨abc⟩
--hub_t ⟨abc⟩
--HUB_TOKEN=⟨abc⟩
-hub_token ⟨abc⟩
---hub_token ⟨abc⟩
—hub_token ⟨abc⟩
–-hub_token ⟨abc⟩
‐‐hub_token=⟨abc⟩
--seed 1 —hub_token ⟨abc⟩
--log_measures rsa —hub_token ⟨abc⟩
hub_token=⟨abc⟩
+hub_token=⟨abc⟩
++trainer.hub_token=⟨abc⟩
~model.secret ⟨abc⟩
trainer.args.key=⟨abc⟩
db.url=⟨postgres⟩://x
--report_to ⟨hunter2⟩
--report_to none ⟨hunter2⟩
--report_to=wandb:⟨abc⟩
--measure ⟨hunter2⟩
--log_measures ⟨hunter2⟩
--log_measures rsa ⟨hunter2⟩
--sample_axis ⟨hunter2⟩
--target_layers ⟨hf_abcdefghijkl⟩
--target_layers h.0 ⟨ghp_abcdefghijkl⟩
--guide_layers ⟨dGhpc0lzQVNlY3JldFRva2Vu⟩
--guide_layers=⟨0123456789abcdef0123⟩
--layer_pairs h.0~⟨AbCdEfGhIjKlMnOpQr⟩
--layer_pairs h.0~h.1@⟨hunter2⟩
--layer_pairs h.0~⟨AbCdEfGhIjKlMnOpQr⟩@0.5
--target_layers ⟨alice@example.com⟩
--label_names labels ⟨glpat-abcdef⟩
--label_names ⟨eyJhbGciOi.eyJzdWIi.c2ln⟩
--include_for_metrics loss ⟨hunter2⟩
--metric_for_best_model ⟨sk-proj-abcdefgh⟩
--tags a ⟨hunter2⟩
--metric_for_best_model ⟨123e4567-e89b-12d3-a456-426614174000⟩
--hub_revision ⟨AIzaSyA-abc⟩
--hub_model_id me/⟨github_pat_abc⟩
--hub_model_id https://⟨abc⟩@huggingface.co/me/net
--output_dir ⟨/home/alice⟩/out
--output_dir ⟨/home/alice⟩
--output_dir=../⟨alice⟩/out
--output_dir ~⟨alice⟩/out
--output_dir ~/⟨acme⟩
--output_dir runs/⟨alice⟩/1
--output_dir runs/⟨bigbox-7⟩.1
--output_dir runs/⟨BigBox-7⟩
--output_dir 'C:\\Users\\⟨Alice⟩'
--output_dir 'my ⟨words⟩'
--output_dir out$(⟨whoami⟩)
--output_dir a/b/c/d/⟨e/f⟩
--text_files ⟨/data/alice⟩/a.txt b.txt
--text_files a.txt ⟨alice⟩/b.txt
--seed ⟨hunter2⟩
--seed 1 ⟨hunter2⟩
--seed=1 ⟨hunter2⟩
--learning_rate ⟨abc⟩
--max_steps ⟨99999999999999999999999999⟩
--use_cpu ⟨hunter2⟩
--bf16=⟨hunter2⟩
--optim ⟨hunter2⟩
--debug ⟨hunter2⟩
--local_addr ⟨10.0.0.7⟩
-- --output_dir ⟨out⟩
--no_such_flag --also=⟨abc⟩ ⟨abc⟩
""".strip().splitlines()
HOSTILE = (
    [f"python train.py {line}" for line in HOSTILE]
    + """
HF_TOKEN=⟨hf_abc⟩ python train.py
env WANDB_API_KEY=⟨abc⟩ accelerate launch train.py
ssh ⟨alice⟩@⟨bigbox-7⟩ python train.py
python ⟨/home/alice⟩/work/train.py
python /srv/⟨hf_abcdefghij.py⟩
python -m ⟨alice⟩.train
python -m train --hub_token ⟨abc⟩
accelerate launch --main_process_ip ⟨10.0.0.7⟩ --main_process_port ⟨29500⟩ train.py
accelerate launch --main_process_ip=⟨bigbox-7⟩ train.py
accelerate launch --main_process_i ⟨bigbox-7⟩ train.py
accelerate launch --num_processes 2 --env TOKEN=⟨abc⟩ train.py
accelerate launch --aws_access_key_id ⟨abc⟩ --aws_secret_access_key ⟨abc⟩ train.py
accelerate launch --config_file ⟨/home/alice⟩/cpu.yaml train.py
accelerate launch --config_file ⟨alice.yaml⟩ train.py
accelerate launch --vm ⟨acme-vm⟩ --gpu_ids ⟨0,1⟩ train.py
accelerate launch --deepspeed_hostfile ⟨/etc/hosts⟩ train.py
accelerate launch --log_dir ⟨acme⟩ --mixed_precision ⟨hunter2⟩ train.py
accelerate launch --num_processes ⟨hunter2⟩ train.py
accelerate launch ⟨my_command⟩ --x ⟨abc⟩
torchrun --nproc_per_node 2 --rdzv_endpoint ⟨bigbox-7:29500⟩ train.py
torchrun --rdzv-endpoint=⟨bigbox-7⟩ --rdzv_id ⟨123⟩ train.py
torchrun --master_addr ⟨10.0.0.7⟩ --local_addr ⟨x⟩ train.py
torchrun --nnodes 2 --node_rank ⟨77⟩ ⟨/home/alice⟩/train.py --key ⟨abc⟩
deepspeed --hostfile ⟨hosts⟩ train.py
""".strip().splitlines()
)

HARMLESS = """
python train.py
python src/train.py
python -m app.train --seed 1
accelerate launch train.py
torchrun train.py
torchrun --standalone --nproc_per_node 2 train.py --seed 1
torchrun --nnodes=2 --nproc-per-node=4 -m app.train
accelerate launch --num_processes 2 --multi_gpu --mixed_precision bf16 train.py
accelerate launch --config_file recipes/accelerate/cpu.yaml --cpu recipes/r.py --use_cpu
python train.py --output_dir out --learning_rate 3e-4 --max_steps=900 --bf16 --disable_tqdm true
python train.py --output-dir ./out --adam_beta1 .9 --warmup_steps 0.1 --seed -1 --tf32 False
python train.py --optim adamw_torch --lr_scheduler_type cosine --save_strategy epoch --report_to wandb
python train.py --hub_model_id alice/net --push_to_hub --hub_strategy all_checkpoints --hub_revision trial
python train.py --deepspeed configs/zero2.json --fsdp full_shard --no_dataloader_pin_memory
python train.py --metric_for_best_model eval_loss --label_names labels start_positions
python train.py --measure debiased_cka --log_measures rsa ridge --guidance_weight 0.5 --sample_axis token
python train.py --target_layers 'h.*.mlp' hidden_states.3 --guide_layers Conv2d ResNetForImageClassification
python train.py --layer_pairs 'hidden_states.1~h.0' 'h.11.attn~layers.5' --guide_shares_tokenizer --max_tokens 64
python train.py --layer_pairs 'h.3~h.1@0.5' 'h.2~h.1@1e-2' --guidance_warmup_steps 20 --guidance_stop_similarity 0.9
python train.py --cache_guide cache/guide --sketch 1024 --sample_id_column id --include_num_input_tokens_seen
accelerate launch recipes/r.py --use_cpu --seeds 0 1 2 --learning_rates 1e-3 3e-3 --runs alone untrained_guide
python r.py --guide timm/resnet18.a1_in1k --text_files outputs/shakespeare.txt --longer_baseline --learning_rates=1e-3
python r.py --dataset asia/sk_SK --guide HuggingFaceTB/SmolLM2-135M --tokenizer EleutherAI/pythia-70m
""".strip().splitlines()


@dataclass
class Own:
    """Of a recipe."""

    seeds: list[int] = field(default_factory=list)
    learning_rates: Optional[list[float]] = None
    runs: Optional[list[str]] = None
    text_files: Optional[list[str]] = None
    guide: Optional[str] = None
    tokenizer: Optional[str] = None
    dataset: Optional[str] = None
    longer_baseline: bool = False


PARSERS = (Own, TrainingArguments, GuidanceConfig)


@pytest.fixture(autouse=True)
def somebody(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/alice"))
    monkeypatch.setenv("USER", "alice")
    monkeypatch.setattr(redaction.platform, "node", lambda: "bigbox-7")


@pytest.mark.parametrize("line", HOSTILE)
def test_nothing_private_is_published_and_the_cut_is_known(line):
    secrets = re.findall("⟨(.*?)⟩", line)
    command, cut = published_command(shlex.split(re.sub("[⟨⟩]", "", line)), PARSERS)
    assert secrets
    assert not [secret for secret in secrets if secret.lower() in command.lower()], command
    paths = ("/home/alice", "/data/alice", "/mnt/acme", "/etc/hosts")  # are cut to their last part, which may stay
    assert cut or any(path in secrets for path in paths), command


@pytest.mark.parametrize("line", HARMLESS)
def test_known_settings_survive_word_for_word(line):
    assert published_command(shlex.split(line), PARSERS) == (line, False)


def test_what_is_known_is_kept_beside_what_is_not():
    words = "python /home/alice/train.py data.txt --seed 1 --wandb-key abc --output_dir /home/alice/out -v --bf16 x"
    assert published_command(words.split(), PARSERS) == ("python train.py --seed 1 --output_dir out", True)


def test_fields_of_other_parsers_are_unknown():
    line = ["python", "train.py", "--runs", "alone", "--seed", "1"]
    assert published_command(line, (TrainingArguments,)) == ("python train.py --seed 1", True)


def test_a_script_in_a_folder_with_somebodys_name_is_called_by_its_own():
    assert published_command(["python", "alice/train.py", "--seed", "1"], PARSERS) == (
        "python train.py --seed 1",
        False,
    )


@pytest.mark.parametrize("words", [[], ["python"], ["bash", "-c", "python train.py"], ["accelerate", "launch"]])
def test_a_command_without_a_script_is_none(words):
    assert published_command(words, PARSERS) == ("", True)
