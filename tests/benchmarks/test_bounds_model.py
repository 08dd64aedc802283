"""Tests of the bounds by hand-computed cases, of the plans against the emulator's counts, and of the tables."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial

import pytest
from kernel_works import work

from bclip_fast.benchmarks.bounds import cuda_code, designs, mix, model, orders, report, shapes, store
from bclip_fast.benchmarks.bounds.cache import BANDS_OF_8, banded, bytes_read
from bclip_fast.benchmarks.bounds.model import Work, bound, pipes
from bclip_fast.benchmarks.bounds.rates import GPUS, SOURCES
from bclip_fast.errors import UserError
from bclip_fast.ops import dispatch, record_files, tuning

A100, H100 = GPUS["a100"], GPUS["h100"]


def test_peak_rate_is_that_of_the_data_sheet():
    assert A100.peak_flops == pytest.approx(312e12, rel=0.001)
    assert H100.peak_flops == pytest.approx(989.5e12, rel=0.001)


def test_every_rate_has_a_source():
    assert set(A100._fields) - set(SOURCES) == {"name", "architecture", "registers", "max_threads"}


@pytest.mark.parametrize(
    ("mix", "gpu", "pipe", "cycles"),
    [
        # 4 warps, one on each sub-core: 8 clocks a product on the A100 and 6 on the H100.
        ({"HMMA.16816": 64}, A100, "tensor", 512),
        ({"HMMA.16816": 64}, H100, "tensor", 384),
        # 64 x 128 x 16 takes 64 clocks of the 4 sub-cores, and reads 2 + 4 KiB of shared memory.
        ({"HGMMA.64x128x16": 4}, H100, "tensor", 256),
        ({"HGMMA.64x128x16": 4}, H100, "shared memory", 192),
        ({"HGMMA.64x128x16.R": 4}, H100, "shared memory", 128),
        # 512 bytes of each of 4 warps take 16 clocks.
        # The copies of the TMA start 32 clocks apart.
        ({"UTMALDG": 2}, H100, "TMA", 4 * 2 * 32),
        ({"LDSM.4": 16}, A100, "shared memory", 256),
        ({"LDS.32": 3, "STS.128": 2, "SHFL": 5}, A100, "shared memory", 4 * (3 + 8 + 5)),
        ({"MUFU.EX2": 10, "MUFU.RCP": 6}, H100, "MUFU", 4 * 16 * 32 / 16),
        ({"FP32": 100}, A100, "FP32", 200),
        ({"FP32": 100}, H100, "FP32", 100),
        ({"INT": 10, "OTHER": 30, "STALL": 500}, A100, "issue", 40),
    ],
)
def test_pipe_needs_cycles_of_published_rate(mix, gpu, pipe, cycles):
    assert pipes(Counter(mix), 4, gpu)[pipe] == cycles


def test_bank_conflicts_multiply_wavefronts():
    assert pipes(Counter({"LDS.32": 10}), 4, A100, {"LDS": 1.5})["shared memory"] == 60


def test_bound_of_products_is_whole_rounds_of_blocks():
    """109 blocks on 108 multiprocessors take as long as 216."""
    products = {"HMMA.16816": 1000}
    flops = 109 * 4 * 1000 * 2 * 16 * 8 * 16
    for blocks in (109, 216):
        each = bound(work([{}, products, {}], blocks, flops=float(flops)), A100)
        assert each.seconds == pytest.approx(2 * 1000 * 8 / 1.41e9)
        assert each.limiter == "tensor" and each.resident == 4
    assert each.share == pytest.approx(109 / 216)


def test_block_alone_cannot_overlap_its_phases():
    """With 128 registers a thread, 512 threads leave no room for a second block."""
    phases = [{}, {"HMMA.16816": 100}, {"MUFU.EX2": 100}]
    together = bound(work(phases, 108), A100)
    alone = bound(work(phases, 108, threads=512), A100)
    assert together.seconds == pytest.approx(800 / 1.41e9) and together.limiter == "tensor"
    assert alone.seconds == pytest.approx(4 * 1600 / 1.41e9) and alone.resident == 1
    assert alone.limiter == "tensor (1 block)"


def test_stall_counts_bound_a_warp():
    phases = [{}, {"HMMA.16816": 10, "STALL": 1000}, {}]
    # Four resident blocks of 4 warps wait together.
    assert bound(work(phases, 4 * 108), A100).seconds == pytest.approx(1000 / 1.41e9)
    assert bound(work(phases, 5 * 108), A100).limiter == "stall counts"


def test_bytes_bound_kernels_without_products():
    each = bound(work([{"OTHER": 1}, {}, {}], hbm_bytes=1.555e9, l2_bytes=1.555e9), A100)
    assert (each.seconds, each.limiter, each.share) == (pytest.approx(1e-3), "HBM", pytest.approx(1.0))


def test_resident_blocks_are_limited_by_each_resource():
    assert model.resident_blocks(255, 65536, 128, A100) == 2
    assert model.resident_blocks(32, 0, 128, A100) == 16
    assert model.resident_blocks(32, 100 * 1024, 128, A100) == 1
    assert model.resident_blocks(32, 100 * 1024, 128, H100) == 2


def test_least_bytes_of_gradient_include_g():
    fields = shapes.Loss(65536, 512).work("softmax", 128, 128, 128, BANDS_OF_8, 20 << 20)
    # G of a launch takes 1 GiB in float16: 8192 rows.
    assert fields["launches"] * fields["blocks"] == 512 * 512 and fields["launches"] == 8
    # A launch reads the features of its 64 rows of tiles once, and those of all columns once in each of its 8 bands.
    assert fields["hbm_bytes"] == 65536 * 512 * 2 * (1 + 8 * 8) + 2 * 65536**2
    assert fields["l2_bytes"] == 512 * 512 * 256 * 512 * 2 + 2 * 65536**2


@pytest.mark.parametrize(
    ("height", "cache", "operands"),
    [
        # 6 rows and 5 columns of tiles. A cache that holds all reads each operand once.
        (2, 100, 6 + 5),
        # Two rows stay while a column passes: rows once, and columns once in each of the 3 bands.
        (2, 6, 6 + 3 * 5),
        (4, 10, 6 + 2 * 5),
        # From one use of a row to the next one, a band of 2 uses 2 rows, 2 columns and 2 results, and a band of 4 uses
        # 4 rows, 2 columns and 4 results. With much less, the rows are read again for each column.
        (4, 4, 6 * 5 + 2 * 5),
        # Each block reads both of its operands.
        (6, 1, 6 * 5 * 2),
    ],
)
def test_features_are_read_again_when_the_cache_lost_them(height, cache, operands):
    order = partial(banded, height)
    assert bytes_read(order, (6, 5), (10, 10), 10, 10 * cache) == 10 * operands


def test_bands_hold_every_tile_once():
    tiles = [banded(4, block, 10, 3) for block in range(30)]
    assert len(set(tiles)) == 30 and set(tiles) == {(row, column) for row in range(10) for column in range(3)}
    assert tiles[:5] == [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1)] and tiles[-3:] == [(9, 1), (8, 2), (9, 2)]


COUNTED = {
    "contrastive_forward<Half>": ("contrastive_forward 256x256x512", "B=65536, D=512"),
    "contrastive_softmax<Half>": ("contrastive_softmax 256x256x512", "B=65536, D=512"),
    "contrastive_sigmoid<Half>": ("contrastive_sigmoid 256x256x512", "B=65536, D=512"),
    **{
        f"attention_{way}<Half, {dim}>": (f"attention_{way} 197x{dim}", f"256 x 197, {768 // dim} x {dim}")
        for way in ("forward", "backward")
        for dim in (32, 64, 96, 128)
    },
}


@pytest.mark.skipif(not cuda_code.COUNTS.exists(), reason="the emulator's counts are missing")
@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_plan_counts_as_many_instructions_as_the_emulator(name, architecture):
    """The plans say how often loops run, and the emulator runs them. Both count the same kernel."""
    case, shape = COUNTED[name]
    counts = json.loads(cuda_code.COUNTS.read_text())[case]["tiles"][0]
    kernel = name.partition("<")[0]
    [work] = (
        work
        for work in store.load().works
        if (work.kernel, work.backend, work.architecture, work.shape) == (kernel, "cuda", architecture, shape)
    )
    warps = work.threads // 32
    assert mix.matrix(work.total) * warps == pytest.approx(counts["multiply"], rel=0.001)
    assert work.total["BAR"] == pytest.approx(counts["block_barrier"], abs=2)
    # A bound may count less than what runs: fewer copies in the code for the rest of an unrolled loop, for example.
    ours = {"ldmatrix": "LDSM", "copy": "LDGSTS", "exp2": "MUFU.EX2", "shuffle": "SHFL"}
    for count, kind in ours.items():
        assert 0.75 * counts[count] <= mix.count(work.total, kind) * warps <= 1.05 * counts[count], count


def test_report_is_generated_from_the_analysis():
    """`python -m benchmarks.bounds` writes both."""
    assert store.REPORT.read_text() == report.markdown(store.load())


def test_design_with_wgmma_counts_whole_tiles_of_64_rows():
    """197 tokens take 4 tiles of 64 rows, 200 columns of scores, and 13 steps of 16 rows in a sum over tokens."""
    forward, backward = (
        next(
            each for each in designs.works() if (each.kernel, each.shape) == (f"attention_{way}", "256 x 197, 12 x 64")
        )
        for way in ("forward", "backward")
    )
    scores, sums = 4 * 4 * 200 / 2, 4 * 13 * 64 / 2  # clocks of one product
    assert pipes(forward.total, 4, H100)["tensor"] == scores + sums
    assert pipes(backward.total, 4, H100)["tensor"] == 2 * scores + 3 * sums
    # Both operands of the scores and of dQ come from shared memory, and one operand of dV and dK.
    read = 2 * 4 * 4 * (64 + 200) * 16 * 2 + 2 * 4 * 13 * 64 * 16 * 2 + 4 * 13 * (64 + 64) * 16 * 2
    moved = 7 * 197 * 64 * 2 + 4 * 64 * 200 * 2
    assert pipes(backward.total, 4, H100)["shared memory"] == pytest.approx((read + moved) / 128)
    assert forward.total["MUFU.EX2"] == 4 * 64 * 200 / 128


def test_backward_of_short_heads_is_near_its_design_with_wgmma():
    """The report says so, because this decided against building it."""
    design = {work.shape: each for work, each in store.bounds(list(designs.works()), "h100") if "back" in work.kernel}
    short = [shape for shape in shapes.ATTENTION if shape.dim == 64 and shape.tokens <= 256]
    names = {shape.work("backward", 1)["shape"] for shape in short}
    checked = 0
    for stored, each in store.bounds(store.load().works, "h100"):
        if (stored.kernel, stored.backend) == ("attention_backward", "cuda") and stored.shape in names:
            assert design[stored.shape].limiter == "HBM" and each.seconds <= 1.2 * design[stored.shape].seconds
            checked += 1
    assert checked == len(names) == 3


def test_bench_model_prints_bounds_and_their_build(capsys):
    assert report.show("h100", fresh=False) == 0
    shown = capsys.readouterr().out
    assert "lower bounds from machine code and published rates, not times" in shown
    for kernel in ("contrastive_softmax", "attention_backward", "single_query_forward", "pointwise_gelu"):
        assert kernel in shown
    assert f"Machine code of {store.load().build}" in shown


def test_no_bound_exceeds_the_peak():
    for gpu in GPUS:
        for each, result in store.bounds(store.load().works, gpu):
            assert 0 < result.share <= 1.0001, (gpu, each.kernel, each.shape)
            assert (
                model.matrix_flops(each.total) * each.threads / 32 * each.blocks * each.launches >= 0.999 * each.flops
            )


@pytest.mark.parametrize("architecture", orders.RECORDS)
def test_default_order_is_generated_from_the_bounds(architecture):
    """`python -m benchmarks.bounds` writes it."""
    record = orders.record_of(store.load().works, architecture)
    path = tuning.DEFAULTS / f"sm_{architecture}.json"
    assert record_files.load(path).made or json.loads(path.read_text()) == record_files.to_json(record)
    assert {key[:2] for key in record.entries} >= {("clip_loss", "float16"), ("varlen_attention", "bfloat16")}


def test_measured_defaults_replace_those_of_the_bounds(monkeypatch, tmp_path):
    (tmp_path / "defaults").mkdir()
    monkeypatch.setattr(orders, "DEFAULTS", tmp_path / "defaults")
    works = store.load().works
    ampere, hopper, with_kernels = orders.write(works)
    measured = record_files.Record({"device": "cuda", "name": "H100", "architecture": "sm_90"}, made="2026-12-01")
    record_files.save(measured, hopper)
    assert orders.write(works) == [ampere, with_kernels]
    assert record_files.load(hopper).made == measured.made


def test_equal_bounds_keep_the_order_of_the_package():
    def loss(backend, stall):
        phases = (Counter(STALL=stall), Counter(), Counter())
        fields = {"flops": 0.0, "l2_bytes": 0.0, "hbm_bytes": 0.0, "operator": "clip_loss", "blocks": 1}
        sizes = {"threads": 128, "registers": 32, "shared": 0}
        return [
            Work(
                kernel="k", backend=backend, architecture="80", shape=shape, phases=phases, bodies={}, **sizes, **fields
            )
            for shape in orders.CLASSES["clip_loss"].values()
        ]

    def order(triton, cuda):
        works = [*loss("triton", triton), *loss("cuda", cuda)]
        return orders.entry_of(store.bounds(works, "a100"), "clip_loss", "B=128, D=512").order

    assert order(105, 100) == ("triton", "cuda") and order(120, 100) == ("cuda", "triton")
    assert set(order(1, 2)) <= set(dispatch.BACKENDS)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("{", "is damaged"), ("[]", "is damaged"), ('{"works": [{}]}', "is damaged")],
)
def test_missing_or_damaged_analysis_is_a_user_error(text, message, monkeypatch, tmp_path):
    path = tmp_path / "bounds.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(store, "ANALYSIS", path)
    with pytest.raises(UserError, match=f"bounds.json {message}.*--fresh"):
        report.show("h100", fresh=False)


@pytest.mark.parametrize(
    ("tools", "triton", "built", "message"),
    [
        (False, True, ["80", "90a"], "cuobjdump and nvdisasm are missing"),
        (True, False, ["80", "90a"], "Triton is missing"),
        (True, True, [], "CUDA module .* is missing: install nvcc"),
        (True, True, ["80"], "built for 80 and not for 90a: build it with BCLIP_CUDA_ARCHS='90a'"),
    ],
)
def test_fresh_analysis_names_what_is_missing(tools, triton, built, message, monkeypatch):
    """`make gpu` builds the module only for the machine's GPU."""
    monkeypatch.setattr(store.machine_code, "has_tools", lambda: tools)
    monkeypatch.setattr(store.machine_code, "architectures", lambda: built)
    monkeypatch.setattr(store, "find_spec", lambda name: name if triton else None)
    with pytest.raises(UserError, match=message):
        report.show("h100", fresh=True)


def test_unchanged_triton_kernels_are_not_compiled_again(monkeypatch):
    stored = store.load()
    monkeypatch.setattr(store, "load", lambda: stored)
    monkeypatch.setattr(store, "current_build", lambda: "CUDA 0, Triton kernels " + stored.build.rpartition(" ")[2])
    assert {work.backend for work in store.unchanged_triton_works()} == {"triton"}
    monkeypatch.setattr(store, "current_build", lambda: stored.build + "0")
    assert store.unchanged_triton_works() == []


def test_fresh_analysis_reads_only_the_architecture_of_the_gpu(monkeypatch, capsys):
    stored, asked = store.load(), []
    monkeypatch.setattr(store, "analyse", lambda architectures: asked.append(architectures) or stored)
    assert report.show("h200", fresh=True) == 0
    assert asked == [["90"]]
    assert "H200: lower bounds" in capsys.readouterr().out
