"""Train the classifier of panel letters, and write its weights.

`python -m benchmarks.train_panel_letters OUT.safetensors` renders letters A to P, capital and small, in the fonts of
Pillow, matplotlib and the system's DejaVu, from light to bold, at 7 to 60 pixels, with blur, JPEG artefacts and noise.
The class "other" has other characters, parts of letters, letters that touch, and shapes of plots. The network has one
hidden layer. Its weights are rounded to 8 bits, and `bclip_fast.ingest.panels.glyphs` evaluates it with integers.
"""

from __future__ import annotations

import argparse
import functools
import io
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from safetensors.numpy import save_file

from bclip_fast.ingest.panels.glyphs import CLASSES, HIDDEN_SHIFT, SIDE, normalised_glyph

SEED = 20261201
NUM_HIDDEN = 96
_OTHERS = "QRSTUVWXYZqrstuvwxyz0123456789&%+=#?/\\*<>[]{}()|-_~^:;.,'\"$@"
_OTHERS += "\u03b1\u03b2\u03b3\u03b4\u03bc\u03c3\u03a3\u0394\u03a9"


@functools.cache
def font_files() -> list[str]:
    """Return the text fonts that Pillow can open, sorted. An empty name is Pillow's own font."""
    import matplotlib

    folders = [Path(matplotlib.get_data_path()) / "fonts/ttf", Path("/usr/share/fonts/truetype/dejavu")]
    names = [path for folder in folders for path in folder.glob("*.ttf")]
    wanted = ("dejavusans", "dejavuserif", "stixgeneral", "cmr10", "cmss10", "cmb10", "cmti10", "liberation")
    good = [str(path) for path in names if path.stem.lower().startswith(wanted) and "display" not in path.stem.lower()]
    return [*([""] * 24), *sorted(good, key=lambda name: (Path(name).name, name))]


@functools.lru_cache(4096)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)


def _draw(text: str, rng: random.Random) -> Image.Image:
    """Return the text in white on black, cut to its ink, at the size of a figure."""
    factor = rng.choice((1, 2, 3))
    height = round(7 * (60 / 7) ** rng.random())
    font = _font(rng.choice(font_files()), max(8, round(height * 1.35 * factor)))
    stroke = rng.choice((0, 0, 0.02, 0.04, 0.06)) * height * factor
    canvas = Image.new("L", (height * factor * (2 + 2 * len(text)), height * factor * 3))
    start = (height * factor // 2, height * factor // 2)
    ImageDraw.Draw(canvas).text(start, text, fill=255, font=font, stroke_width=round(stroke))
    if rng.random() < 0.15:
        canvas = canvas.transform(canvas.size, Image.Transform.AFFINE, (1, rng.uniform(-0.2, 0.2), 0, 0, 1, 0))
    if rng.random() < 0.2:
        canvas = canvas.resize((max(8, round(canvas.width * rng.uniform(0.75, 1.2))), canvas.height))
    if factor > 1:
        canvas = canvas.resize((canvas.width // factor, canvas.height // factor), Image.Resampling.BOX)
    return canvas


def _shape(rng: random.Random) -> Image.Image:
    """Return a shape as it occurs in plots and pictures: a line, an arc, a marker, an arrow, or a blot."""
    side = rng.randint(10, 60)
    canvas = Image.new("L", (side + 16, side + 16))
    draw = ImageDraw.Draw(canvas)

    def point() -> tuple[int, int]:
        return rng.randint(8, side + 8), rng.randint(8, side + 8)

    width = rng.randint(1, max(2, side // 6))
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.randrange(6)
        (x0, y0), (x1, y1) = point(), point()
        box = min(x0, x1), min(y0, y1), max(x0, x1) + 2, max(y0, y1) + 2
        if kind == 0:
            draw.line((x0, y0, x1, y1), fill=255, width=width)
        elif kind == 1:
            draw.arc(box, rng.randint(0, 360), rng.randint(0, 360), fill=255, width=width)
        elif kind == 2:
            draw.ellipse(box, fill=255)
        elif kind == 3:
            draw.rectangle(box, outline=255, fill=rng.choice((None, 255)), width=width)
        elif kind == 4:
            draw.polygon([point() for _ in range(rng.randint(3, 6))], fill=255)
        else:
            noise = np.frombuffer(rng.randbytes(36), np.uint8).reshape(6, 6)
            blot = Image.fromarray(noise).resize(canvas.size, Image.Resampling.BICUBIC)
            canvas.paste(blot.point(lambda value: 255 * (value > 150)))
    return canvas


def _degraded(ink: Image.Image, rng: random.Random) -> np.ndarray:
    """Return the ink, (height, width) uint8, as it looks in a figure: with blur, contrast, noise and artefacts."""
    if rng.random() < 0.4:
        ink = ink.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.9)))
    pixels = np.asarray(ink, np.float32) * rng.uniform(0.65, 1.0)
    if rng.random() < 0.3:
        generator = np.random.default_rng(rng.getrandbits(32))
        pixels += generator.normal(0, rng.uniform(2, 25), pixels.shape)
    result = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if rng.random() < 0.6:
        buffer = io.BytesIO()
        result.save(buffer, "JPEG", quality=rng.randint(40, 95))
        result = Image.open(buffer)
    return np.asarray(result)


def _sample(rng: random.Random) -> tuple[np.ndarray, int] | None:
    """Return a glyph, (SIDE, SIDE) uint8, and its class."""
    kind = rng.random()
    if kind < 0.6:
        label = rng.randrange(len(CLASSES))
        ink = _draw(CLASSES[label], rng)
    else:
        label = len(CLASSES)
        if kind < 0.8:
            ink = _draw(rng.choice(_OTHERS), rng)
        elif kind < 0.86:
            ink = _draw("".join(rng.choices(CLASSES + _OTHERS, k=2)).replace(" ", ""), rng)
        elif kind < 0.93:
            ink = _shape(rng)
        else:
            ink = _draw(rng.choice(CLASSES + _OTHERS), rng)
    pixels = _degraded(ink, rng)
    mask = pixels > rng.randint(55, 150)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) < 6 or len(columns) < 2:
        return None
    box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    if kind >= 0.93:  # part of a character
        side = rng.randrange(4)
        size = (box[2] - box[0], box[3] - box[1])[side % 2]
        box[side] += round(rng.uniform(0.25, 0.6) * size) * (1 if side < 2 else -1)
    left, top, right, bottom = (int(value) for value in box)
    if bottom - top < 5 or right - left < 2:
        return None
    return normalised_glyph(pixels[top:bottom, left:right]), label


def make_samples(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return glyphs, (num, SIDE * SIDE) uint8, and classes, (num,) int64."""
    rng = random.Random(seed)
    glyphs: list[np.ndarray] = []
    labels: list[int] = []
    while len(glyphs) < num:
        if sample := _sample(rng):
            glyphs.append(sample[0].ravel())
            labels.append(sample[1])
    return np.array(glyphs), np.array(labels)


def train(glyphs: np.ndarray, labels: np.ndarray, *, epochs: int) -> dict[str, np.ndarray]:
    """Return the weights, rounded to integers."""
    torch.manual_seed(SEED)
    hidden = torch.nn.Linear(SIDE * SIDE, NUM_HIDDEN)
    output = torch.nn.Linear(NUM_HIDDEN, len(CLASSES) + 1)
    optimizer = torch.optim.AdamW([*hidden.parameters(), *output.parameters()], lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    inputs, targets = torch.from_numpy(glyphs), torch.from_numpy(labels)
    for epoch in range(epochs):
        losses = []
        for batch in torch.randperm(len(inputs)).split(512):
            pixels = inputs[batch].float() / 255
            logits = output(torch.relu(hidden(pixels)).clamp(max=4.0))
            loss = torch.nn.functional.cross_entropy(logits, targets[batch], label_smoothing=0.02)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        schedule.step()
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.3f}")
    return _rounded(hidden, output)


def _rounded(hidden: torch.nn.Linear, output: torch.nn.Linear) -> dict[str, np.ndarray]:
    """Return integer weights: hidden units have 64 steps per unit, up to 4, and pixels 255."""
    first, second = hidden.weight.detach().double(), output.weight.detach().double()
    scale = 2**HIDDEN_SHIFT * 64 / 255
    weights = (first * scale).round().clamp(-127, 127)
    second_scale = 127 / second.abs().max()
    return {
        "hidden.weight": weights.to(torch.int8).numpy(),
        "hidden.bias": (hidden.bias.detach().double() * scale * 255).round().to(torch.int32).numpy(),
        "output.weight": (second * second_scale).round().to(torch.int8).numpy(),
        "output.bias": (output.bias.detach().double() * second_scale * 64).round().to(torch.int32).numpy(),
        # Logits of the network are the integers divided by this.
        "scale": np.array([round(float(second_scale) * 64)], np.int32),
    }


def main() -> None:
    """Train, write the weights, and print the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--num_samples", type=int, default=80_000)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    weights = train(*make_samples(options.num_samples, SEED), epochs=options.epochs)
    save_file(weights, options.out)
    from bclip_fast.ingest.panels import glyphs

    samples, labels = make_samples(10_000, SEED + 1)
    logits = glyphs.logits(samples, weights)
    print(f"accuracy on 10,000 other samples: {np.mean(logits.argmax(axis=1) == labels):.3f}")


if __name__ == "__main__":
    main()
