"""Tests of the emulator's counters: on a kernel whose accesses the tests choose, and on the real kernels."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import cuda_emulator
import kernel_counts
import pytest
import torch
from kernel_counts import source_of

from bclip_fast.benchmarks import cuda_resources

# As in csrc/cuda/emulator/counting_kernel.h.
PATTERNS = ["SHARED_LOAD", "SHARED_STORE", "GLOBAL_LOAD", "GLOBAL_STORE", "COPY", "LOOP", "REJOINED_LOOP", "UNITS"]
LANES = range(32)


@pytest.fixture(scope="module")
def host():
    return cuda_emulator.module()


def run(host, pattern, places, size=4, blocks=1):
    """The launch of the counting kernel, whose lanes access `places`. None: the lane is inactive."""
    table = torch.tensor([-1 if place is None else place for place in places], dtype=torch.int32)
    memory = torch.zeros(8192, dtype=torch.uint8)
    start = -memory.data_ptr() % 128
    host.counters.start()
    host.run_counting_kernel(PATTERNS.index(pattern), size, table.data_ptr(), memory.data_ptr() + start, blocks)
    host.counters.stop()
    (launch,) = host.counters.read()
    return launch


def operation(tile, kind):
    """The only operation of a kind, without those of the kernel's preparation."""
    (found,) = [one for one in tile["operations"] if one["kind"] == kind and "preparation" not in source_of(one)]
    return found


# Size of an access in bytes, place of each lane, wavefronts, least wavefronts.
BANKS = {
    "one word each": (4, [4 * lane for lane in LANES], 1, 1),
    "one word each, reversed": (4, [124 - 4 * lane for lane in LANES], 1, 1),
    "one word each, from the middle of a row of banks": (4, [64 + 4 * lane for lane in LANES], 1, 1),
    "broadcast": (4, [20] * 32, 1, 1),
    "2-way": (4, [8 * lane for lane in LANES], 2, 1),
    "3 words in a bank": (4, [4 * lane + 128 * min(lane, 2) - 4 * min(lane, 2) for lane in LANES], 3, 1),
    "16-way": (4, [64 * lane for lane in LANES], 16, 1),
    "32-way": (4, [128 * lane for lane in LANES], 32, 1),
    "two halves of a word": (2, [2 * lane for lane in LANES], 1, 1),
    "bytes": (1, [*LANES], 1, 1),
    "bytes, 4-way": (1, [16 * lane for lane in LANES], 4, 1),
    "pairs": (8, [8 * lane for lane in LANES], 2, 2),
    "pairs, 2-way": (8, [16 * lane for lane in LANES], 4, 2),
    "pairs whose half-warps share banks": (8, [8 * (lane % 16) + 128 * (lane // 16) for lane in LANES], 2, 2),
    "quads": (16, [16 * lane for lane in LANES], 4, 4),
    "quads, 2-way": (16, [32 * lane for lane in LANES], 8, 4),
    "quads, 8-way": (16, [128 * lane for lane in LANES], 32, 4),
    "5 active lanes": (4, [4 * lane if lane < 5 else None for lane in LANES], 1, 1),
    "odd lanes, 2-way": (4, [8 * lane if lane % 2 else None for lane in LANES], 2, 1),
    "every fourth lane, 8-way": (4, [32 * lane if lane % 4 == 0 else None for lane in LANES], 8, 1),
    "quads of 9 lanes": (16, [16 * lane if lane < 9 else None for lane in LANES], 2, 2),
}  # fmt: skip


# The emulator takes stores of two lanes to the same two bytes for a race.
STORED = [case for case in BANKS if case not in ("broadcast", "bytes")]


@pytest.mark.parametrize(
    ("pattern", "case"), [("SHARED_LOAD", case) for case in BANKS] + [("SHARED_STORE", case) for case in STORED]
)
def test_wavefronts_equal_known_counts(host, pattern, case):
    size, places, wavefronts, least = BANKS[case]
    (tile,) = run(host, pattern, places, size)["tiles"]
    one = operation(tile, pattern.lower())
    lanes = sum(place is not None for place in places)
    assert (one["instructions"], one["lanes"], one["lane_bytes"]) == (1, lanes, size)
    assert (one["wavefronts"], one["least_wavefronts"]) == (wavefronts, least)
    assert one["sectors"] == one["bytes"] == 0


# Size of an access in bytes, place of each lane, sectors, least sectors.
SECTORS = {
    "words": (4, [4 * lane for lane in LANES], 4, 4),
    "words, a word after the start of a sector": (4, [4 * lane + 4 for lane in LANES], 5, 4),
    "words in sectors of their own": (4, [32 * lane for lane in LANES], 32, 4),
    "broadcast": (4, [40] * 32, 1, 1),
    "bytes": (1, [lane + 30 for lane in LANES], 2, 1),
    "halves, every third": (2, [6 * lane for lane in LANES], 6, 2),
    "quads": (16, [16 * lane for lane in LANES], 16, 16),
    "quads, half a sector after its start": (16, [16 * lane + 16 for lane in LANES], 17, 16),
    "quads in sectors of their own": (16, [64 * lane for lane in LANES], 32, 16),
    "pairs of 3 lanes": (8, [8 * lane if lane in (3, 4, 9) else None for lane in LANES], 3, 1),
}  # fmt: skip


@pytest.mark.parametrize("case", SECTORS)
@pytest.mark.parametrize("pattern", ["GLOBAL_LOAD", "GLOBAL_STORE"])
def test_sectors_equal_known_counts(host, pattern, case):
    size, places, sectors, least = SECTORS[case]
    (tile,) = run(host, pattern, places, size)["tiles"]
    one = operation(tile, pattern.lower())
    lanes = sum(place is not None for place in places)
    assert (one["instructions"], one["lanes"], one["bytes"]) == (1, lanes, lanes * size)
    assert (one["sectors"], one["least_sectors"]) == (sectors, least)
    assert one["wavefronts"] == 0


def test_copies_without_source_read_no_sectors(host):
    (tile,) = run(host, "COPY", [16 * lane if lane < 10 else None for lane in LANES])["tiles"]
    one = operation(tile, "copy")
    assert (one["instructions"], one["lanes"], one["bytes"], one["sectors"]) == (1, 32, 160, 5)
    assert one["wavefronts"] == one["least_wavefronts"] == 4


def test_units_count_once_a_warp(host):
    places = [128 * (lane % 8) + 16 * (lane // 8) if lane != 3 else None for lane in LANES]
    (tile,) = run(host, "UNITS", places)["tiles"]
    for kind, lanes in {"exp2": 31, "log2": 31, "ldmatrix": 32, "shuffle": 32, "warp_barrier": 32}.items():
        one = operation(tile, kind)
        assert (one["instructions"], one["lanes"]) == (1, lanes), kind
    assert sum(one["instructions"] for one in tile["operations"] if one["kind"] == "multiply") == 2
    # The rows of each of the four matrices are 128 bytes apart, except one that an inactive place moves to 0.
    rows = operation(tile, "ldmatrix")
    assert (rows["wavefronts"], rows["least_wavefronts"]) == (7 + 8 + 8 + 8, 4)
    # Two warps make the barrier of a block, which counts once.
    barrier = operation(tile, "block_barrier")
    assert (barrier["instructions"], barrier["lanes"]) == (1, 64)


def test_lanes_that_leave_a_loop_earlier_meet_after_rejoin(host):
    """Lane i makes i % 4 passes, twice. Together again, the warp issues 3 loads each time."""
    places = [lane % 4 for lane in LANES]
    (together,) = run(host, "REJOINED_LOOP", places)["tiles"]
    one = operation(together, "global_load")
    assert (one["instructions"], one["lanes"], one["sectors"]) == (6, 2 * 8 * (1 + 2 + 3), 2 * (4 + 4 + 4))
    # Without the mark, the second loop of a lane with 2 passes begins as the third pass of the first loop.
    (apart,) = run(host, "LOOP", places)["tiles"]
    assert operation(apart, "global_load")["instructions"] == 6
    assert operation(apart, "global_load")["sectors"] > one["sectors"]


def test_blocks_with_equal_counts_share_a_tile(host):
    launch = run(host, "SHARED_LOAD", [4 * lane if lane > 1 else None for lane in LANES], blocks=5)
    assert launch["kernel"] == "counting_count<unsigned int>"
    assert (launch["blocks"], launch["threads"], launch["shared_bytes"]) == (5, 64, 4096)
    assert [tile["blocks"] for tile in launch["tiles"]] == [[0, 1, 2], [3], [4]]
    assert [operation(tile, "shared_load")["lanes"] for tile in launch["tiles"]] == [30, 29, 28]


def test_order_of_threads_and_blocks_does_not_change_counts(host):
    launches = []
    for seed in range(3):
        host.set_seed(seed)
        launches.append(run(host, "REJOINED_LOOP", [lane % 5 for lane in LANES], blocks=3))
    assert launches[0] == launches[1] == launches[2]


def test_counters_forget_launches_that_are_read_or_not_counted(host):
    run(host, "UNITS", [0] * 32)
    assert host.counters.read() == []
    table = torch.zeros(32, dtype=torch.int32)
    host.run_counting_kernel(PATTERNS.index("UNITS"), 4, table.data_ptr(), 0, 1)
    assert host.counters.read() == []
    # A launch that fails isn't counted.
    host.counters.start()
    with pytest.raises(RuntimeError, match="outside"):
        run(host, "SHARED_LOAD", [4096] * 32)
    host.counters.stop()
    assert host.counters.read() == []


# The real kernels.


@pytest.fixture(scope="module")
def launches():
    """The counted launch of each case of the file."""
    return kernel_counts.launches()


@pytest.fixture(scope="module")
def ragged_launches():
    """Launches with ragged tiles, groups, masks and dropout, and with rows that need separate offsets."""
    mask = torch.rand(307) < 0.7
    far = replace(kernel_counts.contrastive_call(130, 140, 40), scale=torch.tensor(400.0))
    calls = [lambda: kernel_counts.contrastive_forward(far)]
    for run in kernel_counts.CONTRASTIVE:
        calls += [lambda run=run: run(kernel_counts.contrastive_call(130, 140, 72, grouped=True))]
    for run in kernel_counts.ATTENTION:
        for dim in (32, 64, 128):
            call = replace(kernel_counts.attention_call([307], dim, causal=True, dropout=0.2), key_mask=mask)
            calls += [lambda run=run, call=call: run(call)]
    with kernel_counts.emulated() as module:
        return [launch for call in calls for launch in kernel_counts.counts(module, call)]


# The bank conflicts of the kernels: the first letters of the kernel's name, the kind, a part of the line of source, and
# the most wavefronts for each that is needed. Any other conflict fails the tests, and so does an entry that is mended.
CONFLICTS = [
    # Two rows of a warp, or 16 columns, read lines that the scale of the resize chooses.
    ("image_resize", "shared_load", "between.load(place_of(x - start, column_in_chunk))", 2),
]


def test_bank_conflicts_are_those_listed(launches, ragged_launches):
    found, unlisted = set(), {}
    for launch in [*launches.values(), *ragged_launches]:
        for tile in launch["tiles"]:
            for one in tile["operations"]:
                if one["wavefronts"] == one["least_wavefronts"]:
                    continue
                source, ratio = source_of(one), one["wavefronts"] / one["least_wavefronts"]
                entries = [
                    entry for entry in CONFLICTS
                    if launch["kernel"].startswith(entry[0]) and one["kind"] == entry[1] and entry[2] in source
                ]  # fmt: skip
                if not [entry for entry in entries if ratio <= entry[3]]:
                    unlisted[launch["kernel"], one["kind"], source] = ratio
                found |= set(entries)
    assert unlisted == {}
    assert sorted(set(CONFLICTS) - found) == [], "remove what is mended from CONFLICTS"


def test_lanes_of_16_bytes_use_whole_sectors(launches):
    """32 lanes of 16 bytes need 16 sectors, or fewer where lanes repeat a row."""
    kinds = set()
    for name, launch in launches.items():
        for tile in launch["tiles"]:
            for one in tile["operations"]:
                if one["lane_bytes"] == 16 and one["bytes"]:
                    assert one["sectors"] == one["least_sectors"], (name, source_of(one))
                    kinds.add((launch["kernel"].partition("<")[0], one["kind"]))
    copying = ["contrastive_forward", "contrastive_softmax", "contrastive_sigmoid"]
    copying += ["attention_forward", "attention_backward"]
    assert kinds >= {(kernel, "copy") for kernel in copying}
    assert kinds >= {(kernel, "global_store") for kernel in copying[1:]}


def totals(launches, name):
    """The counts of the most frequent tile of a case."""
    return kernel_counts.tile_totals(launches[name]["tiles"][0])


@pytest.mark.parametrize("width", [512, 1024])
@pytest.mark.parametrize("kernel", ["contrastive_forward", "contrastive_softmax", "contrastive_sigmoid"])
def test_counts_of_loss_tile_equal_formulas(launches, kernel, width):
    for tile in launches[f"{kernel} 256x256x{width}"]["tiles"]:
        tile = kernel_counts.tile_totals(tile)
        # A product is 16 x 8 x 16. Each of the two operands is read once from global memory, 2 bytes an element.
        assert tile["multiply"] == 128 * 128 * width // (16 * 8 * 16)
        assert tile["bytes"]["copy"] == 2 * 128 * width * 2
        # Four warps in two rows and two columns read each operand twice from shared memory.
        assert tile["ldmatrix"] == 2 * 2 * 128 * width // (16 * 16)
        assert tile["ldmatrix"] <= 0.25 * tile["multiply"]
        # One exponential for each element, and few for the rows and columns.
        assert 0 <= tile["exp2"] - 128 * 128 // 32 <= 8
        results = 2 * 128 * 4 if kernel == "contrastive_forward" else 128 * 128 * 2
        assert 0 <= tile["bytes"]["global_store"] - results <= 12
        assert tile["bytes"]["global_load"] <= 4096
        # One barrier for each 32 columns of the operands.
        assert tile["block_barrier"] <= width // 32 + 8


@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_counts_of_attention_equal_formulas(launches, dim):
    tokens, rounded = 197, 208
    products = rounded * rounded * dim // (16 * 8 * 16)
    forward = totals(launches, f"attention_forward 197x{dim}")
    # The forward pass takes keys in pairs of tiles of 16.
    assert forward["multiply"] == 2 * products * 224 // rounded
    assert forward["bytes"]["global_store"] == tokens * dim * 2 + tokens * 4
    assert rounded * 224 // 32 <= forward["exp2"] <= 1.05 * rounded * 224 // 32
    backward = totals(launches, f"attention_backward 197x{dim}")
    assert backward["multiply"] == 5 * products
    # The result and its gradient for the row sums of their product, and the log-sum-exps.
    assert backward["bytes"]["global_load"] >= 2 * tokens * dim * 2 + tokens * 4
    if dim <= 64:
        # All keys fit into the registers and shared memory of a block, so every other number is read and written once.
        # The last strip of queries repeats the last one.
        assert forward["bytes"]["copy"] == (2 * tokens + rounded) * dim * 2
        assert backward["bytes"]["copy"] == 4 * tokens * dim * 2
        assert backward["bytes"]["global_load"] == 2 * tokens * dim * 2 + tokens * 4
        assert backward["bytes"]["global_store"] == 3 * tokens * dim * 2


def test_counts_of_image_equal_formulas(launches):
    for kind, size in (("uint8", 1), ("float16", 2)):
        tiles = [kernel_counts.tile_totals(tile) for tile in launches[f"image_resize 103x77 to 48 {kind}"]["tiles"]]
        assert sum(tile["blocks"] for tile in tiles) == 9
        assert {tile["bytes"]["global_store"] for tile in tiles} == {16 * 16 * 3 * size}


def test_file_equals_emulators_counts(launches):
    text = kernel_counts.text_of(kernel_counts.record(launches))
    assert kernel_counts.FILE.read_text() == text, "run python tests/support/kernel_counts.py"
    names = set(re.findall(r"^\| (\w+<.*?>) \|", cuda_resources.REPORT.read_text(), re.M))
    assert {case["kernel"] for case in json.loads(text).values()} <= names
