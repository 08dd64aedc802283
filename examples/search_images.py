"""Index the images of a folder, and print those nearest to a text.

python examples/search_images.py MODEL FOLDER "pleural effusion"
"""

import argparse

from bclip_fast.search.index import EmbedConfig, embed
from bclip_fast.search.searcher import OpenConfig, Searcher

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("folder")
parser.add_argument("query")
parser.add_argument("--index", default="runs/index")
parser.add_argument("-k", type=int, default=5)
args = parser.parse_args()

index = embed(EmbedConfig(model=args.model, data=args.folder, out=args.index, progress=False))
searcher = Searcher(OpenConfig(folder=str(index)))
for hit in searcher.text(args.query, k=args.k):
    print(f"{hit.score:.3f}  {hit.key}")
