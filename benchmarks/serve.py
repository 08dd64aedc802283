"""Answers per second of `bclip serve` to clients on the loopback, with 24 images on each page.

    python -m benchmarks.serve [--before CHECKOUT] [--clients 32] [--seconds 20]

The data are JPEG images of noise, 512 pixels wide, with captions. The model is a small one with random weights. The
clients ask 64 texts in turn. `--before` names a checkout of another version of the package, whose server answers the
same requests in the same run, in turn with ours. The first requests fill the caches and are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image

from bclip_fast import pretrained
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.text import TextConfig
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.model.vision import VisionConfig
from bclip_fast.search.index import EmbedConfig, embed

NUM_QUERIES, HITS = 64, 24
_SERVER = """
import sys
from bclip_fast.search import serve, searcher
config = serve.ServeConfig(folder=sys.argv[1], port=0, k=24)
server = serve.start_server(config, searcher.Searcher(config))
print(server.port, flush=True)
server.serve_forever()
"""


def main() -> None:
    """Measure, and print a line of JSON for each round and version, then the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="checkout of the version to compare with")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0, help="time of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1000)
    args = parser.parse_args()
    here = Path(__file__).parents[1]
    versions = {"now": here} | ({"before": Path(args.before)} if args.before else {})
    with tempfile.TemporaryDirectory() as folder:
        index = _write_index(Path(folder), args.images)
        servers = {name: _start(path, index) for name, path in versions.items()}
        try:
            rates: dict[str, list[float]] = {name: [] for name in servers}
            for number in range(-1, args.rounds):
                for name, (_, port) in servers.items():
                    rate, num_bytes = _load(port, args.clients, args.seconds)
                    if number >= 0:
                        rates[name].append(rate)
                        shown = {"version": name, "answers_per_s": round(rate, 1), "bytes": num_bytes}
                        print(json.dumps(shown | {"clients": args.clients}), flush=True)
        finally:
            for process, _ in servers.values():
                process.kill()
                process.wait()
    medians = {name: float(np.median(values)) for name, values in rates.items()}
    if "before" in medians:
        print(json.dumps({"ratio": round(medians["now"] / medians["before"], 2)} | medians))


def _write_index(folder: Path, num_images: int) -> Path:
    generator = np.random.default_rng(0)
    lines = ["path,caption,split"]
    (folder / "images").mkdir()
    for i in range(num_images):
        patches = generator.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(patches).resize((512, 384), Image.Resampling.BICUBIC).save(
            folder / f"images/{i}.jpg", quality=90
        )
        lines.append(f"images/{i}.jpg,a chest radiograph with finding {i % 97},val")
    (folder / "data.csv").write_text("\n".join(lines) + "\n")
    torch.manual_seed(0)
    words = Tokenizer.train(lines, 200, context_length=32)
    vision = VisionConfig(image_size=64, patch_size=16, width=64, layers=2, heads=2)
    text = TextConfig(context_length=32, vocab_size=200, width=64, layers=2, heads=2, max_positions=40)
    model = BiomedClip(BiomedClipConfig(embed_dim=64, vision=vision, text=text))
    pretrained.save(folder / "model", model, Preprocess(PreprocessConfig(size=64)), words)
    data, out = str(folder / "data.csv"), str(folder / "index")
    return embed(EmbedConfig(model=str(folder / "model"), data=data, out=out, progress=False))


def _start(package: Path, index: Path) -> tuple[subprocess.Popen[str], int]:
    environment = os.environ | {"PYTHONPATH": str(package)}
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(index)], env=environment, cwd=index, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def _load(port: int, num_clients: int, seconds: float) -> tuple[float, int]:
    """Return the answers per second and the bytes of the last answer."""
    counts, sizes = [0] * num_clients, [0] * num_clients
    end = time.monotonic() + seconds

    def ask(client: int) -> None:
        while time.monotonic() < end:
            number = (client * 7 + counts[client]) % NUM_QUERIES
            request = f"GET /?k={HITS}&q={quote(f'a radiograph with finding {number}')} HTTP/1.0\r\n"
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(f"{request}Host: localhost\r\n\r\n".encode())
                size = 0
                status = b""
                while block := connection.recv(1 << 18):
                    status = status or block[:16]
                    size += len(block)
            if b" 200 " not in status:
                raise RuntimeError(f"the server answered {status!r}")
            counts[client] += 1
            sizes[client] = size

    start = time.monotonic()
    threads = [threading.Thread(target=ask, args=(client,)) for client in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.monotonic() - start), max(sizes)


if __name__ == "__main__":
    main()
