# %% [markdown]
# # Fine-tune on a CSV file
#
# This tutorial trains a model further on your own images and captions. It starts from the run of
# [the pretraining tutorial](pretrain.md). Any model works: a run, a folder in open_clip's layout, or `hf-hub:ORG/NAME`.
#
# You need `pip install 'bclip_fast[eval]'`.
#
# ## The CSV file
#
# It has the columns `path` and `caption`. Paths are relative to the file. A column `split` is optional.

# %%
import csv
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 40), "blue": (50, 50, 230), "grey": (130, 130, 130)}
Path("images").mkdir()
with open("pairs.csv", "w", newline="") as file:
    table = csv.writer(file)
    table.writerow(["path", "caption", "split"])
    for number in range(48):
        colour = list(COLOURS)[number % 4]
        name = f"images/{colour}{number}.png"
        pixels = np.clip(np.random.default_rng(number).normal(COLOURS[colour], 25, (40, 40, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(name)
        table.writerow([name, f"a {colour} pattern", "train" if number < 40 else "val"])

# %% [markdown]
# ## Train
#
# `--lora_rank 8` trains small adapters instead of all weights, and merges them at the end. The defaults suit a large
# pretrained model. This tiny one needs a higher rate.

# %% [bash]
# bclip finetune runs/tiny --data pairs.csv --run runs/finetuned --batch_size 8 --epochs 5 \
#     --optim.lr 1e-3 --optim.warmup_steps 2

# %% [markdown]
# The result is a model folder, as of any run. It loads in one line, and open_clip reads it, too.

# %%
import bclip_fast

model, preprocess, tokenizer = bclip_fast.load("runs/finetuned")
print(model.config.embed_dim, preprocess.config.size)

# %% [markdown]
# ```text
# 32 32
# ```
#
# ## A classifier from labels
#
# With a column `label` in place of captions, the same command trains a classifier. Here each patient has two images,
# and `--group` keeps both in one split. `--freeze_towers` trains only the head.

# %%
with open("labels.csv", "w", newline="") as file:
    table = csv.writer(file)
    table.writerow(["path", "label", "patient_id"])
    for number in range(48):
        colour = list(COLOURS)[number % 4]
        table.writerow([f"images/{colour}{number}.png", colour, f"{colour} {number // 8}"])

# %% [bash]
# bclip finetune runs/finetuned --data labels.csv --task classification --group patient_id --freeze_towers \
#     --run runs/classifier --batch_size 8 --epochs 20 --optim.lr 1e-2 --optim.warmup_steps 2

# %% [markdown]
# `runs/classifier/report.html` shows the metrics on test, and the mistakes. [Fine-tune BiomedCLIP on your
# CSV](../finetune.md) explains each choice, and the export to ONNX.
#
# Next: [evaluate both models and compare them](evaluate_and_compare.md).
