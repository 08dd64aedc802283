# %% [markdown]
# # Evaluate and compare
#
# This tutorial evaluates two models on the same images, and tests whether the difference is more than chance. It uses
# the models and the images of [the fine-tuning tutorial](finetune_on_a_csv.md).
#
# ## From the command line
#
# Without `--task`, the command runs the protocols that the data allow: retrieval for captions, and zero-shot
# classification for labels. Each evaluation writes a report, JSON, CSV and the scores of every sample.

# %% [bash]
# bclip eval runs/tiny --data pairs.csv --task retrieval --duplicates captions --out runs/eval-before --cache none
# bclip eval runs/finetuned --data pairs.csv --task retrieval --duplicates captions --out runs/eval-after --cache none

# %% [markdown]
# ```text
# ...
# │ retrieval │ image to text R@1 │ ...
# ...
# ```
#
# Several images here have the same caption. `--duplicates captions` accepts each of them as correct.
#
# ## Compare
#
# Both models saw the same samples, so the test is paired. It corrects for the number of comparisons (Holm).

# %% [bash]
# bclip eval compare runs/eval-before runs/eval-after --out runs/compare

# %% [markdown]
# ```text
# ...
# ┃ task ...┃ metric ...┃ model ...┃ score ...
# ...
# ```
#
# ## From Python
#
# `evaluate` returns the same scores. It takes a path, or a model that you already have in memory.

# %%
from bclip_fast.eval import evaluate

results = evaluate("runs/finetuned", ["retrieval"], data="pairs.csv", duplicates="captions", cache="none")
for figure in results["tasks"]["retrieval"]["figures"]:
    if figure["name"].endswith("R@1"):
        print(f"{figure['name']}: {figure['value'] > figure['chance']}")

# %% [markdown]
# ```text
# image to text R@1: True
# text to image R@1: True
# ```
#
# Next: [search your figures with the model](search_your_figures.md). [Evaluation](../evaluation.md) has the tasks of
# the paper, probes, and the rules for splits and labels.
