# %% [markdown]
# # Search your figures
#
# This tutorial makes an index of images, and searches it by text and by image. It uses the model and the images of
# [the fine-tuning tutorial](finetune_on_a_csv.md).
#
# You need `pip install 'bclip_fast[search]'`.
#
# ## Make the index
#
# `--data` takes a folder of images, a CSV file or shards. The index is a folder with a faiss index and a Parquet file.

# %% [bash]
# bclip embed runs/finetuned --data images --out index

# %% [markdown]
# ## Search it
#
# A query is a text or an image file. The index remembers its model, and rejects embeddings of any other.

# %% [bash]
# bclip search index "a red pattern" -k 3 --gallery hits.html
# bclip search index images/blue2.png -k 3

# %% [markdown]
# ```text
# ...
# │ 1 │ ...  │ red...png ...
# ...
# │ 1 │ 1.000  │ blue...png ...
# ...
# ```
#
# ## From Python
#
# `Searcher` opens the index and its model once. Its methods return hits with key, score, caption and licence.

# %%
from bclip_fast.search.searcher import OpenConfig, Searcher

searcher = Searcher(OpenConfig(folder="index"))
hits = searcher.text("a blue pattern", k=3)
print(len(searcher), len(hits), hits[0].score >= hits[1].score)

# %% [markdown]
# ```text
# 48 3 True
# ```
#
# ## A page with a search box
#
# `serve` shows the same on a local page, with thumbnails, licences and links to the articles:
#
#     bclip serve index
