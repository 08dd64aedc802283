"""`bclip bench images`: real figures to squares of pixels, ours against the rivals, and how far each is from Pillow."""

from __future__ import annotations

import functools
import importlib
import io
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bclip_fast.errors import UserError
from bclip_fast.ops import image as image_ops

from .cases import Unavailable, figures, peer

log = logging.getLogger(__name__)

# The files and the number of threads -> the pixels of each, (size, size, 3) uint8 but for the decoders.
Contender = Callable[[Sequence[bytes], int], Sequence[Any] | Tensor]


@dataclass(frozen=True)
class ImagesConfig:
    """JPEG files of BCLIP_SHARED_DATA's PMC articles, decoded, resized and cropped as open_clip does to evaluate."""

    num_images: int = 400
    """Or all, where fewer are there; the table's title says how many."""
    size: int = 224
    rounds: int = 4
    """Of all contenders in turn; the fastest counts, ratios are taken within rounds."""
    threads: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        if min(self.num_images, self.size, self.rounds, *self.threads) < 1 or not self.threads:
            raise UserError(f"{self}: every number must be at least 1")


def contenders(size: int) -> dict[str, Callable[[], Contender]]:
    """Name -> a maker that raises Unavailable with the reason. The decoders alone are the floor of the others."""
    made = {
        "decode: simplejpeg": lambda: each(simplejpeg().decode_jpeg),
        "decode: ours": lambda: each(image_ops.decode),
        "Pillow": lambda: each(lambda data: pillow(data, size)),
        "Pillow draft": lambda: each(lambda data: pillow(data, size, draft=True)),
        "torchvision + torch": lambda: torchvision(size),
        "simplejpeg + torch": lambda: each(lambda data: resized(simplejpeg().decode_jpeg(data), size)),
        "simplejpeg reduced + torch": lambda: each(
            lambda data: resized(simplejpeg().decode_jpeg(data, min_height=size, min_width=size), size)
        ),
        "OpenCV area": lambda: opencv(size),
        "DALI CPU": lambda: dali(size),
    }
    for name, exact in {"ours exact": True, "ours fast": False}.items():
        made[name] = functools.partial(ours, size, exact)
    return made


def ours(size: int, exact: bool) -> Contender:
    def run(files: Sequence[bytes], threads: int) -> Tensor:
        return image_ops.decode_resize(files, size, exact=exact, threads=threads)[0]

    return run


def each(one: Callable[[bytes], Any]) -> Contender:
    """A contender without threads of its own: files are shared out to ours."""

    def run(files: Sequence[bytes], threads: int) -> list[Any]:
        if threads == 1:
            return [one(data) for data in files]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(one, files))

    return run


def crop_offsets(width: int, height: int, size: int) -> tuple[int, int]:
    return round((width - size) / 2), round((height - size) / 2)


def pillow(data: bytes, size: int, draft: bool = False) -> np.ndarray:
    image: Image.Image = Image.open(io.BytesIO(data))
    target = image_ops.shortest_edge_size(*image.size, size)
    if draft:
        image.draft("RGB", target)
    image = image.convert("RGB").resize(target, Image.Resampling.BICUBIC)
    left, top = crop_offsets(*target, size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def resized(pixels: Any, size: int) -> Tensor:
    """(H, W, 3) uint8 through torch's antialiased bicubic on bytes, the nearest to Pillow's that there is elsewhere."""
    height, width = pixels.shape[:2]
    target = image_ops.shortest_edge_size(width, height, size)
    channels = torch.as_tensor(pixels).permute(2, 0, 1)[None]
    out = F.interpolate(channels, size=(target[1], target[0]), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    left, top = crop_offsets(*target, size)
    return out[top : top + size, left : left + size].contiguous()


def simplejpeg() -> Any:
    return peer(lambda: importlib.import_module("simplejpeg"))


def torchvision(size: int) -> Contender:
    try:
        io_module = peer(lambda: importlib.import_module("torchvision.io"))
        # What doesn't load is known at the first call alone.
        io_module.decode_jpeg(torch.tensor(list(jpeg_of_one_pixel()), dtype=torch.uint8))
    except RuntimeError as error:
        raise Unavailable(f"torchvision's compiled part doesn't load: {str(error).splitlines()[0]}") from error
    mode = io_module.ImageReadMode.RGB

    def one(data: bytes) -> Tensor:
        pixels = io_module.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=mode)
        return resized(pixels.permute(1, 2, 0), size)

    return each(one)


def jpeg_of_one_pixel() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (1, 1)).save(out, "JPEG")
    return out.getvalue()


def opencv(size: int) -> Contender:
    module = peer(lambda: importlib.import_module("cv2"))
    module.setNumThreads(0)

    def one(data: bytes) -> np.ndarray:
        pixels = module.imdecode(
            np.frombuffer(data, np.uint8), module.IMREAD_COLOR_RGB | module.IMREAD_IGNORE_ORIENTATION
        )
        target = image_ops.shortest_edge_size(pixels.shape[1], pixels.shape[0], size)
        left, top = crop_offsets(*target, size)
        return module.resize(pixels, target, interpolation=module.INTER_AREA)[top : top + size, left : left + size]

    return each(one)


def dali(size: int) -> Contender:
    """In one batch, sizes and crops computed as open_clip does: DALI itself would round them."""
    peer(lambda: importlib.import_module("nvidia.dali"))
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    @functools.cache
    def pipeline(num: int, threads: int) -> Any:
        built = Pipeline(batch_size=num, num_threads=threads, device_id=None, prefetch_queue_depth=1)
        with built:
            data, target, corner = (fn.external_source(name=name) for name in ("data", "target", "corner"))
            image = fn.decoders.image(data, device="cpu", adjust_orientation=False)
            image = fn.resize(
                image,
                size=target,
                interp_type=types.INTERP_CUBIC,
                antialias=True,
                subpixel_scale=False,
                dtype=types.UINT8,
            )
            image = fn.slice(image, corner, (size, size), axes=(0, 1), normalized_anchor=False, normalized_shape=False)
            built.set_outputs(image)
        built.build()
        return built

    def run(files: Sequence[bytes], threads: int) -> list[np.ndarray]:
        built = pipeline(len(files), threads)
        targets = []
        for data in files:
            height, width = image_ops.peek_size(data)
            targets.append(image_ops.shortest_edge_size(width, height, size))
        built.feed_input("data", [np.frombuffer(data, np.uint8) for data in files])
        built.feed_input("target", [np.array(target[::-1], np.float32) for target in targets])
        corners = [crop_offsets(*target, size)[::-1] for target in targets]
        built.feed_input("corner", [np.array(corner, np.int32) for corner in corners])
        (out,) = built.run()
        return list(out.as_array())

    return run


def measure_images(config: ImagesConfig) -> list[dict[str, Any]]:
    """A row for each contender and number of threads, and one with the reason for each that is missing."""
    files = figures(config.num_images, least=1)
    truth = np.stack([pillow(data, config.size) for data in files]).astype(np.int16)
    case = f"{len(files)}-figures-to-{config.size}"
    found: dict[str, Contender] = {}
    rows: list[dict[str, Any]] = []
    common = dict(operator="images", case=case, num_units=len(files), unit="image")
    distances: dict[str, dict[str, float]] = {}
    with one_torch_thread():
        for name, make in contenders(config.size).items():
            try:
                found[name] = make()
                pixels = found[name](files, 1)
            except Unavailable as reason:
                found.pop(name, None)
                rows.append({**common, "contender": name, "missing": str(reason)})
                continue
            if not name.startswith("decode"):
                difference = np.abs(np.stack([np.asarray(one) for one in pixels]).astype(np.int16) - truth)
                distances[name] = {"error": float(difference.max()), "mean_error": float(difference.mean())}
        for threads in config.threads:
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
            for number in range(config.rounds):
                for name, run in found.items():
                    start = time.perf_counter(), time.process_time()
                    run(files, threads)
                    spent = time.perf_counter() - start[0], time.process_time() - start[1]
                    times[name].append(spent)
                    log.info("round %d, %d threads, %s: %.0f images/s", number, threads, name, len(files) / spent[0])
            for name in found:
                ratios = [one[0] / own[0] for one, own in zip(times["Pillow"], times[name], strict=True)]
                rows.append(
                    {
                        **common,
                        "contender": name,
                        "num_threads": threads,
                        "seconds": min(wall for wall, _ in times[name]),
                        "cpu_seconds": min(cpu for _, cpu in times[name]),
                        "times_pillow": statistics.median(ratios),
                        **distances.get(name, {}),
                    }
                )
    return rows


class one_torch_thread:
    """Rivals that torch resizes for share the files among threads, not one picture."""

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self.before)


def show_images(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    measured = [row for row in rows if "missing" not in row]
    counts = list(dict.fromkeys(row["num_threads"] for row in measured))
    title = (
        f"{rows[0]['case']}: images/s, the fastest round; x Pillow, the median of rounds; levels off Pillow's pixels"
    )
    table = Table(title=title, title_justify="left")
    headings = [f"{text}{count} thread{'s' * (count > 1)}" for count in counts for text in ("", "x, ")]
    for heading in ("contender", *headings, "CPU ms", "mean off", "most"):
        table.add_column(heading, justify="left" if heading == "contender" else "right", no_wrap=True)
    for name in dict.fromkeys(row["contender"] for row in measured):
        own = [row for row in measured if row["contender"] == name]
        speeds = [
            text for row in own for text in (f"{row['num_units'] / row['seconds']:.0f}", f"{row['times_pillow']:.2f}")
        ]
        off = [f"{own[0]['mean_error']:.3f}", f"{own[0]['error']:.0f}"] if "error" in own[0] else ["", ""]
        table.add_row(name, *speeds, f"{own[0]['cpu_seconds'] / own[0]['num_units'] * 1e3:.2f}", *off)
    (Console() if os.isatty(1) else Console(width=120)).print(table)
    for row in rows:
        if "missing" in row:
            print(f"missing: {row['contender']}: {row['missing']}")
    for line in against_the_floor(measured):
        print(line)


def against_the_floor(rows: list[dict[str, Any]]) -> Iterator[str]:
    """How much of ours is what decoding every pixel alone takes; cropping decodes fewer."""
    spent = {row["contender"]: row["cpu_seconds"] for row in rows if row["num_threads"] == rows[0]["num_threads"]}
    for floor in ("decode: simplejpeg", "decode: ours"):
        if floor in spent:
            parts = (f"{name} {spent[floor] / spent[name]:.0%}" for name in ("ours exact", "ours fast"))
            yield f"{floor} alone takes, of the CPU time of " + ", of ".join(parts)
