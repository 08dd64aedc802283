# %% [markdown]
# # Zero-shot classification with BiomedCLIP
#
# A CLIP model classifies an image without training. It compares the image with a caption for each class, and the most
# similar caption wins.
#
# You need `pip install 'bclip_fast[model]'`. The first call downloads the published weights (790 MB) from the hub.
#
# ## Load the model
#
# `load` returns the model, the preprocessing of images and the tokenizer. They always belong together.

# %%
import bclip_fast

model, preprocess, tokenizer = bclip_fast.load("hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224")
print(preprocess.config.size, tokenizer.context_length)

# %% [markdown]
# ```text
# 224 256
# ```
#
# ## An image and its classes
#
# Use an image of your own. This one is a grey disc, which the script writes itself.

# %%
import numpy as np
from PIL import Image

y, x = np.mgrid[:300, :400]
Image.fromarray(np.where((y - 150) ** 2 + (x - 200) ** 2 < 100**2, 180, 20).astype(np.uint8)).save("figure.png")
classes = ["chest X-ray", "brain MRI", "haematoxylin and eosin stain", "bar chart"]

# %% [markdown]
# ## The probabilities
#
# Both towers return unit vectors. Their products are cosines, and the learned logit scale turns them into logits.

# %%
import torch

with torch.no_grad():
    image = model.encode_image(preprocess(Image.open("figure.png"))[None])
    captions = model.encode_text(tokenizer([f"this is a photo of {name}" for name in classes]))
    probabilities = (model.logit_scale.exp() * image @ captions.T).softmax(dim=-1)[0]
print(tuple(image.shape), tuple(captions.shape), f"{probabilities.sum().item():.3f}")

# %% [markdown]
# ```text
# (1, 512) (4, 512) 1.000
# ```
#
# The loop prints a line for each class, the most probable first. This page was tested with random weights of the
# published shapes, so it shows no probabilities.

# %%
for index in probabilities.argsort(descending=True).tolist():
    print(f"{probabilities[index].item():.1%}  {classes[index]}")

# %% [markdown]
# ```text
# ...%  ...
# ...%  ...
# ...%  ...
# ...%  ...
# ```
#
# ## Many images
#
# `bclip eval` classifies a folder with one folder of images per class, and writes scores with confidence intervals:
#
#     bclip eval hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224 --task zero_shot --data FOLDER
#
# [Evaluation](../evaluation.md) lists the tasks of the paper and the prompts.
