"""`bclip bench images`: time to decode and resize real figures, and the distance from Pillow's pixels."""

from __future__ import annotations

import functools
import importlib
import io
import logging
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
from .table import print_table

log = logging.getLogger(__name__)

# Takes the files and the number of threads. Returns the pixels of each file, (size, size, 3) uint8. A contender that
# only decodes returns the full size.
Contender = Callable[[Sequence[bytes], int], Sequence[Any] | Tensor]


@dataclass(frozen=True)
class ImagesConfig:
    """Decode JPEGs of BCLIP_SHARED_DATA's PMC articles, then resize and crop them as open_clip's evaluation does."""

    num_images: int = 400
    """Number of files, or all files if there are fewer. The table's title gives the number."""
    size: int = 224
    """Side of the resulting squares in pixels."""
    rounds: int = 4
    """Number of rounds. A round runs each contender. A ratio is the median over rounds, a time the fastest."""
    threads: tuple[int, ...] = (1, 2)
    """Numbers of threads to measure."""

    def __post_init__(self) -> None:
        if min(self.num_images, self.size, self.rounds, *self.threads) < 1 or not self.threads:
            raise UserError(f"{self}: every number must be at least 1")


def contenders(size: int) -> dict[str, Callable[[], Contender]]:
    """Return the maker of each contender by name. It raises Unavailable with the reason.

    The contenders "decode: ..." only decode, which is the least that the others have to do.
    """
    makers = {
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
        makers[name] = functools.partial(ours, size, exact)
    return makers


def ours(size: int, exact: bool) -> Contender:
    """Return our operator. exact: with Pillow's pixels."""

    def run(files: Sequence[bytes], threads: int) -> Tensor:
        return image_ops.decode_resize(files, size, exact=exact, threads=threads)[0]

    return run


def each(decode: Callable[[bytes], Any]) -> Contender:
    """Return a contender that handles each file with `decode`, which has no threads. Files go to a pool of threads."""

    def run(files: Sequence[bytes], threads: int) -> list[Any]:
        if threads == 1:
            return [decode(data) for data in files]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(decode, files))

    return run


def crop_offsets(width: int, height: int, size: int) -> tuple[int, int]:
    """Return the left and top edge of the central square."""
    return round((width - size) / 2), round((height - size) / 2)


def pillow(data: bytes, size: int, draft: bool = False) -> np.ndarray:
    """Return open_clip's pixels, (size, size, 3). draft: let the decoder scale the image down first."""
    image: Image.Image = Image.open(io.BytesIO(data))
    target = image_ops.shortest_edge_size(*image.size, size)
    if draft:
        image.draft("RGB", target)
    image = image.convert("RGB").resize(target, Image.Resampling.BICUBIC)
    left, top = crop_offsets(*target, size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def resized(pixels: Any, size: int) -> Tensor:
    """Resize (H, W, 3) uint8 with torch's antialiased bicubic filter, which is the closest one to Pillow's."""
    height, width = pixels.shape[:2]
    target = image_ops.shortest_edge_size(width, height, size)
    channels = torch.as_tensor(pixels).permute(2, 0, 1)[None]
    out = F.interpolate(channels, size=(target[1], target[0]), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    left, top = crop_offsets(*target, size)
    return out[top : top + size, left : left + size].contiguous()


def simplejpeg() -> Any:
    """Return the module simplejpeg. Raises Unavailable if it is not installed."""
    return peer(lambda: importlib.import_module("simplejpeg"))


def torchvision(size: int) -> Contender:
    """Return torchvision's decoder with torch's resize. Raises Unavailable if torchvision cannot be loaded."""
    try:
        io_module = peer(lambda: importlib.import_module("torchvision.io"))
        # A compiled part that cannot be loaded raises only in the first call.
        io_module.decode_jpeg(torch.tensor(list(jpeg_of_one_pixel()), dtype=torch.uint8))
    except RuntimeError as error:
        raise Unavailable(f"torchvision's compiled part doesn't load: {str(error).splitlines()[0]}") from error
    mode = io_module.ImageReadMode.RGB

    def one(data: bytes) -> Tensor:
        pixels = io_module.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=mode)
        return resized(pixels.permute(1, 2, 0), size)

    return each(one)


def jpeg_of_one_pixel() -> bytes:
    """Return a JPEG file of one black pixel."""
    out = io.BytesIO()
    Image.new("RGB", (1, 1)).save(out, "JPEG")
    return out.getvalue()


def opencv(size: int) -> Contender:
    """Return OpenCV's decoder with its area filter."""
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
    """Return DALI with all files in one batch.

    It takes sizes and crops computed by open_clip's rules, because its own rounding differs.
    """
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
    """Return a row for each contender and number of threads, and a row with the reason for each missing contender."""
    files = figures(config.num_images, least=1)
    truth = np.stack([pillow(data, config.size) for data in files]).astype(np.int16)
    case = f"{len(files)}-figures-to-{config.size}"
    available: dict[str, Contender] = {}
    rows: list[dict[str, Any]] = []
    common = dict(operator="images", case=case, num_units=len(files), unit="image")
    distances: dict[str, dict[str, float]] = {}
    with one_torch_thread():
        for name, make in contenders(config.size).items():
            try:
                available[name] = make()
                pixels = available[name](files, 1)
            except Unavailable as reason:
                available.pop(name, None)
                rows.append({**common, "contender": name, "missing": str(reason)})
                continue
            if not name.startswith("decode"):
                difference = np.abs(np.stack([np.asarray(one) for one in pixels]).astype(np.int16) - truth)
                distances[name] = {"error": float(difference.max()), "mean_error": float(difference.mean())}
        for threads in config.threads:
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in available}
            for number in range(config.rounds):
                for name, run in available.items():
                    start = time.perf_counter(), time.process_time()
                    run(files, threads)
                    spent = time.perf_counter() - start[0], time.process_time() - start[1]
                    times[name].append(spent)
                    log.info("round %d, %d threads, %s: %.0f images/s", number, threads, name, len(files) / spent[0])
            for name in available:
                ratios = [one[0] / other[0] for one, other in zip(times["Pillow"], times[name], strict=True)]
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
    """Sets torch to one thread. Contenders that resize with torch then use their threads for files, not for rows."""

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self.before)


def show_images(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table, with the missing contenders below it."""
    measured = [row for row in rows if "missing" not in row]
    counts = list(dict.fromkeys(row["num_threads"] for row in measured))
    title = (
        f"{rows[0]['case']}: images/s, the fastest round; x Pillow, the median of rounds; levels off Pillow's pixels"
    )
    headings = [f"{text}{count} thread{'s' * (count > 1)}" for count in counts for text in ("", "x, ")]
    cells = []
    for name in dict.fromkeys(row["contender"] for row in measured):
        of_contender = [row for row in measured if row["contender"] == name]
        speeds = [
            text
            for row in of_contender
            for text in (f"{row['num_units'] / row['seconds']:.0f}", f"{row['times_pillow']:.2f}")
        ]
        first = of_contender[0]
        off = [f"{first['mean_error']:.3f}", f"{first['error']:.0f}"] if "error" in first else ["", ""]
        cells.append([name, *speeds, f"{first['cpu_seconds'] / first['num_units'] * 1e3:.2f}", *off])
    print_table(title, ["contender", *headings, "CPU ms", "mean off", "most"], cells)
    for row in rows:
        if "missing" in row:
            print(f"missing: {row['contender']}: {row['missing']}")
    for line in share_of_decoding(measured):
        print(line)


def share_of_decoding(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield lines with the CPU time of decoding every pixel as a share of ours, which decodes only the crop."""
    spent = {row["contender"]: row["cpu_seconds"] for row in rows if row["num_threads"] == rows[0]["num_threads"]}
    for decoder in ("decode: simplejpeg", "decode: ours"):
        if decoder in spent:
            parts = (f"{name} {spent[decoder] / spent[name]:.0%}" for name in ("ours exact", "ours fast"))
            yield f"{decoder} takes, as a share of the CPU time of ours: " + ", ".join(parts)
