"""Images per second of `bclip embed` beside sentence-transformers and a loop over open_clip, with equal weights.

    python -m benchmarks.embed_rate [--images 192] [--batch_sizes 1 16 64] [--rounds 3]

All three read the same JPEG files, decode, resize and embed them, in one process and in turn. The model is a small CLIP
(ViT-S/32 with 6 layers) with random weights, in float32. It is exported for sentence-transformers, and open_clip loads
the same folder as we do. A line of JSON gives the medians, our ratio to each, and the largest distance of their
embeddings from ours. sentence-transformers resizes with its own processor, which rounds to bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bclip_fast import pretrained
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.eval.embed import Embedder
from bclip_fast.export import sentence_transformers
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.presets import preset
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.model.vision import VisionConfig
from bclip_fast.search.index import open_images

from .peers import import_open_clip, import_torchvision

Embed = Callable[[int], np.ndarray]


def main() -> None:
    """Measure, and print a line of JSON for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = _write_images(Path(folder), args.images)
        contenders = _contenders(Path(folder), files)
        for batch_size in args.batch_sizes:
            rows = {name: embed(batch_size) for name, embed in contenders.items()}  # warms up
            times: dict[str, list[float]] = {name: [] for name in contenders}
            for _ in range(args.rounds):
                for name, embed in contenders.items():
                    start = time.perf_counter()
                    embed(batch_size)
                    times[name].append(time.perf_counter() - start)
            rates = {name: len(files) / float(np.median(values)) for name, values in times.items()}
            distances = {name: np.linalg.norm(rows[name] - rows["ours"], axis=1).max() for name in rows}
            result = {
                "batch_size": batch_size, "threads": torch.get_num_threads(),
                "images_per_s": {name: round(rate, 1) for name, rate in rates.items()},
                "ours_over": {name: round(rates["ours"] / rate, 2) for name, rate in rates.items() if name != "ours"},
                "distance": {name: round(float(value), 5) for name, value in distances.items() if name != "ours"},
            }  # fmt: skip
            print(json.dumps(result), flush=True)


def _write_images(folder: Path, num: int) -> list[Path]:
    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    files = [folder / "images" / f"{i:05d}.jpg" for i in range(num)]
    for file in files:
        patches = Image.fromarray(generator.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        patches.resize((512, 384), Image.Resampling.BICUBIC).save(file, quality=90)
    return files


def _contenders(folder: Path, files: list[Path]) -> dict[str, Embed]:
    import_torchvision()
    from sentence_transformers import SentenceTransformer

    torch.manual_seed(0)
    words = Tokenizer.train(["a chest radiograph", "a slide of tissue"] * 3, 100, context_length=20)
    text = dataclasses.replace(preset("clip_b16").text, context_length=20, max_positions=20, vocab_size=100, end_id=3)
    text = dataclasses.replace(text, width=64, layers=2, heads=2)
    vision = VisionConfig(kind="clip", image_size=224, patch_size=32, width=384, layers=6, heads=6)
    model = BiomedClip(BiomedClipConfig(embed_dim=256, vision=vision, text=text, quick_gelu=True)).eval()
    preprocess = Preprocess(PreprocessConfig(size=224))
    pretrained.save(folder / "model", model, preprocess, words)
    sentence_transformers.save(folder / "sentence_transformers", model, preprocess, words)
    data = open_images(str(folder / "images"), "val")
    st = SentenceTransformer(str(folder / "sentence_transformers"), device="cpu")
    other, _, transform = import_open_clip().create_model_and_transforms(f"local-dir:{folder / 'model'}")
    other.eval()

    def ours(batch_size: int) -> np.ndarray:
        embedder = Embedder(model, preprocess, words, batch_size=batch_size, num_workers=2)
        return embedder.uncached_images(data).numpy()

    def with_sentence_transformers(batch_size: int) -> np.ndarray:
        images = [Image.open(file) for file in files]
        return st.encode(images, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)

    def with_open_clip(batch_size: int) -> np.ndarray:
        rows = []
        with torch.inference_mode():
            for start in range(0, len(files), batch_size):
                images = [transform(Image.open(file)) for file in files[start : start + batch_size]]
                rows.append(other.encode_image(torch.stack(images), normalize=True))
        return torch.cat(rows).numpy()

    return {"ours": ours, "sentence_transformers": with_sentence_transformers, "open_clip": with_open_clip}


if __name__ == "__main__":
    main()
