# %% [markdown]
# # Pretrain on 8 GPUs, and on Slurm
#
# This tutorial pretrains on the shards of [the tutorial before it](pmc_to_shards.md). It runs on two CPU cores. The
# commands for eight GPUs and for Slurm differ only in the launcher and in one file.
#
# You need `pip install 'bclip_fast[train]'`.
#
# ## A configuration
#
# A configuration is a TOML file. Files apply from left to right, then flags. This one describes a tiny model.
# `biomedclip_b16.toml` of the package is BiomedCLIP as published.

# %%
from pathlib import Path

Path("tiny.toml").write_text("""
preset = ""
batch_size = 12
epochs = 40

[model]
embed_dim = 32
[model.vision]
image_size = 32
patch_size = 8
width = 64
layers = 2
heads = 2
[model.text]
context_length = 16
vocab_size = 96
width = 64
layers = 2
heads = 2
max_positions = 16

[data]
shards = "shards"
shuffle_block = 16
crop_scale = [0.9, 1.0]

[optim]
lr = 2e-3
warmup_steps = 10

[engine]
name = "ddp"
precision = "fp32"

[checkpoint]
every_steps = 20
""")

# %% [markdown]
# ## Does it fit?
#
# `bclip plan` estimates memory, operations and hours on the given machine. It fails if the run cannot fit.

# %% [bash]
# bclip plan tiny.toml

# %% [markdown]
# ```text
# World       1 rank(s) on 1 node(s), ...
# Precision   fp32
# Samples     24 an epoch: shards
# Parameters  image tower 115,648, text tower 112,000; trained 227,649
# Length      80 steps, 960 pairs seen
# ...
# ```
#
# For the published model on eight H100 GPUs, add the file of the machine:
#
#     bclip plan biomedclip_b16.toml h100_x8.toml --data.shards SHARDS
#
# ## Train
#
# torchrun starts one process for each rank. `--resume` starts the run, or continues it from its newest checkpoint.

# %% [bash]
# torchrun --nproc-per-node 2 -m -- bclip_fast.cli train tiny.toml --run runs/tiny --max_steps 30 --resume

# %% [markdown]
# On a machine with eight GPUs, the command has the same form:
#
#     torchrun --nproc-per-node 8 -m -- bclip_fast.cli train biomedclip_b16.toml h100_x8.toml \
#         --data.shards SHARDS --resume
#
# ## Stop and continue
#
# A run continues bit for bit, also on another number of ranks. Here, one process continues the run of two.
# The resumed run has more steps, so its learning rate follows a longer curve, and the log says so.

# %% [bash]
# bclip train tiny.toml --run runs/tiny --resume

# %%
import json

metrics = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
losses = [line["loss"] for line in metrics if "loss" in line]
print(len(losses), losses[-1] < losses[0])

# %% [markdown]
# ```text
# 80 True
# ```
#
# ## On Slurm
#
# The package has a batch script. Slurm sends it a signal before the time limit. The run then saves a checkpoint and
# exits with status 75, and the script puts the job back into the queue:
#
#     sbatch slurm.sbatch biomedclip_b16.toml nodes4.toml --data.shards SHARDS
#
# The script is `bclip_fast/configs/slurm.sbatch`. It was tested with stand-ins for srun and scontrol, not on a cluster.
#
# ## Look at the run, and export it
#
# `report` draws the curves and the time of each part of a step. `export` writes the model for open_clip,
# transformers, sentence-transformers or ONNX.

# %% [bash]
# bclip train report runs/tiny
# bclip export runs/tiny -o exported --to open_clip

# %%
print(sorted(path.name for path in Path("exported").glob("open_clip*")))

# %% [markdown]
# ```text
# ['open_clip_config.json', 'open_clip_model.safetensors']
# ```
#
# Next: [fine-tune the model on a CSV file](finetune_on_a_csv.md). [Training](../training.md) explains large batches,
# losses and resume.
