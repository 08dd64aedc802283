"""Print the probability of each class for an image.

    python examples/zero_shot.py hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224 figure.jpg \
        "chest X-ray" "brain MRI" "bar chart"
"""

import argparse

import torch
from PIL import Image

import bclip_fast

parser = argparse.ArgumentParser()
parser.add_argument("model", help="hf-hub:ORG/NAME, a run, or a folder in open_clip's layout")
parser.add_argument("image")
parser.add_argument("classes", nargs="+")
parser.add_argument("--template", default="this is a photo of {}")
args = parser.parse_args()

model, preprocess, tokenizer = bclip_fast.load(args.model)
captions = [args.template.format(name) for name in args.classes]
with torch.no_grad():
    image = model.encode_image(preprocess(Image.open(args.image))[None])
    texts = model.encode_text(tokenizer(captions))
    probabilities = (model.logit_scale.exp() * image @ texts.T).softmax(dim=-1)[0]
for index in probabilities.argsort(descending=True).tolist():
    print(f"{probabilities[index].item():6.1%}  {args.classes[index]}")
