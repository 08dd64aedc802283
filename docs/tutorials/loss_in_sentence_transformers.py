# %% [markdown]
# # The loss in sentence-transformers
#
# `MultipleNegativesRankingLoss` of sentence-transformers compares every query with every document of the batch.
# Our class has its arguments, attributes and defaults, and computes the loss without the matrix of scores.
#
# Import it from our package. Everything else of your script stays:
#
#     from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
#     from bclip_fast.integrations.sentence_transformers import MultipleNegativesRankingLoss
#
#     model = SentenceTransformer("NAME")
#     loss = MultipleNegativesRankingLoss(model, directions=("query_to_doc", "doc_to_query"))
#     trainer = SentenceTransformerTrainer(model, train_dataset=pairs, loss=loss)
#
# ## The loss on embeddings
#
# The function `multiple_negatives_ranking_loss` takes embeddings, so it needs no model. Here, the documents are the
# queries with some noise.

# %%
import torch

from bclip_fast.integrations.sentence_transformers import multiple_negatives_ranking_loss

torch.manual_seed(0)
queries = torch.randn(256, 64, requires_grad=True)
documents = queries.detach() + torch.randn(256, 64)
loss = multiple_negatives_ranking_loss(queries, documents)
loss.backward()
print(f"{loss.item():.3f}")

# %% [markdown]
# ```text
# 0.014
# ```
#
# ## The same from its definition
#
# The loss is the cross-entropy of 20 times the cosines. The target of query i is document i.

# %%
normalize = torch.nn.functional.normalize
scores = 20 * normalize(queries, dim=-1) @ normalize(documents, dim=-1).T
print(f"{torch.nn.functional.cross_entropy(scores, torch.arange(256)).item():.3f}")

# %% [markdown]
# ```text
# 0.014
# ```
#
# ## Both directions, and hard negatives
#
# With `doc_to_query`, each document also finds its query. Both directions together read the scores once.
# Further tensors of documents are hard negatives.

# %%
both = multiple_negatives_ranking_loss(queries, documents, directions=("query_to_doc", "doc_to_query"))
hard_negatives = queries.detach() + 2 * torch.randn(256, 64)
harder = multiple_negatives_ranking_loss(queries, [documents, hard_negatives])
print(f"{both.item():.3f} {harder.item():.3f}")

# %% [markdown]
# ```text
# 0.014 0.051
# ```
#
# [Peers' own tests](../peers.md) describes how the tests of sentence-transformers run on our class.
