"""The model of the communication, tables of more GPUs, and the check of the loader."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from synthetic import tiny_model

from bclip_fast import cli
from bclip_fast import config as config_files
from bclip_fast.errors import UserError
from bclip_fast.hardware import GIB, ClusterConfig, cluster_of
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.plan import command, estimate, loader, micro_batches, network, scale_report, scaling
from bclip_fast.plan.samples import PMC_15M
from bclip_fast.plan.timeline import StepTime, step_time
from bclip_fast.plan.traffic import Collective, Parameters, step_traffic
from bclip_fast.plan.types import Plan
from bclip_fast.train.config import DataConfig, TrainConfig
from bclip_fast.train.engine import EngineConfig

H100 = ClusterConfig(devices_per_node=8, device="h100", allow_slow_loader=True)
CONFIG = TrainConfig(preset="", model=tiny_model(), batch_size=4096, cluster=H100).with_precision("bf16")
COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)


def scaled(config: TrainConfig = CONFIG, **scale: Any) -> scaling.Scaling:
    plan = plan_of(config)
    return scaling.Scaling(config, scaling.ScaleConfig(**{"gpus": COUNTS, **scale}), plan)


def plan_of(config: TrainConfig) -> Plan:
    return estimate.build_plan(config, PMC_15M, cluster_of(config.cluster))


def test_ring_of_two_nodes_takes_hops_and_bytes():
    cluster = cluster_of(replace(H100, nodes=2))
    gather = Collective("text features", "all-gather", "loss", 1e9)
    hops = 8.4e-6 + 14 * 3.4e-6 + 9.6e-6
    assert network.seconds(gather, cluster) == pytest.approx(hops + 15 / 16 * 1e9 / 370e9)
    total = Collective("gradients", "all-reduce", "backward", 1e9, 4)
    once = 8.4e-6 + 1.9 * (28 * 3.4e-6 + 2 * 9.6e-6) + 2 * 15 / 16 * 0.25e9 / 370e9
    assert network.seconds(total, cluster) == pytest.approx(4 * once)


def test_small_sum_on_many_nodes_takes_a_tree():
    cluster = cluster_of(replace(H100, nodes=128))
    seconds = network.seconds(Collective("loss", "all-reduce", "loss", 8.0), cluster)
    assert seconds == pytest.approx(4.4e-6 + 2 * (7 * 0.52e-6 + 7 * 5.0e-6), rel=1e-3)


def test_network_cards_of_a_node_limit_its_ranks():
    for nics, gbit, expected in ((0, 0, 370e9), (4, 200, 0.94 * 4 * 25e9), (1, 400, 0.94 * 50e9)):
        cluster = cluster_of(replace(H100, nodes=2, nics_per_node=nics, network_gbit=gbit))
        assert network.bandwidth(cluster) == pytest.approx(expected)
    assert network.bandwidth(cluster_of(replace(H100, nics_per_node=1))) == 370e9


def timeline(engine: EngineConfig, backward: float, num_micro_batches: int = 1) -> StepTime:
    config = replace(CONFIG, engine=replace(engine, precision="bf16", bucket_mib=1))
    parameters = Parameters([50_000_000], [50_000_000], [50_000_000])
    sizes = {"num_ranks": 8, "batch_size": 4096, "num_micro_batches": num_micro_batches}
    compute = {"forward": backward / 2, "backward": backward, "loss": 1e-5}
    traffic = step_traffic(config, parameters, **sizes)
    return step_time(config, cluster_of(H100), compute, traffic, num_micro_batches)


def test_ddp_hides_gradients_up_to_the_last_bucket():
    step = timeline(EngineConfig(name="ddp"), backward=1.0)
    (gradients,) = (part for part in step.communication if part.collective.name == "gradients")
    assert gradients.exposed == pytest.approx(gradients.total / gradients.collective.count)
    short = timeline(EngineConfig(name="ddp"), backward=gradients.total / 4)
    assert short.exposed_of("gradients") == pytest.approx(gradients.total * 0.75, rel=0.01)
    # Only the last micro-batch's backward pass hides them.
    parts = timeline(EngineConfig(name="ddp"), backward=gradients.total, num_micro_batches=4)
    assert parts.exposed_of("gradients") == pytest.approx(short.exposed_of("gradients"))


def test_zero_stages_expose_what_deepspeed_does_not_overlap():
    one, three = (timeline(EngineConfig(zero_stage=stage), backward=1.0) for stage in (1, 3))
    totals = {(part.collective.name, part.collective.phase): part for part in one.communication}
    for key in (("gradients", "backward"), ("updated weights", "update")):
        assert totals[key].exposed == totals[key].total > 0
    for part in three.communication:
        if part.collective.name in ("weights", "gradients"):
            assert part.exposed == pytest.approx(part.total / part.collective.count)


def test_text_gather_is_hidden_by_the_tile_of_local_texts():
    config = replace(CONFIG, engine=EngineConfig(name="ddp", precision="bf16"))
    parameters = Parameters.of(BiomedClip(CONFIG.model), config)
    traffic = step_traffic(config, parameters, num_ranks=8, batch_size=65536, num_micro_batches=1)
    for seconds, share in ((0.0, 0.0), (1.0, 1.0)):
        step = step_time(config, cluster_of(H100), {"backward": 1.0, "loss": seconds}, traffic, 1)
        for part in step.communication:
            if part.collective.name in ("text features", "text gradients"):
                assert part.exposed == pytest.approx(part.total * (1 - share))


def test_exposed_communication_grows_with_gpus_and_batch():
    result = scaled()
    assert [point.cluster.ranks for point in result.points] == list(COUNTS)
    assert [point.stage.batch_size for point in result.points] == [512 * count for count in COUNTS]
    exposed = [point.step.exposed for point in result.points]
    assert exposed == sorted(exposed)
    assert result.points[0].step.efficiency > result.points[-1].step.efficiency
    # The table contains the plan itself.
    assert result.points[0].step.total == pytest.approx(sum((plan_of(CONFIG).stages[0].seconds or {}).values()))


def test_best_setting_is_as_fast_as_its_own_plan():
    result = scaled(gpus=(64,))
    best = result.best
    assert best is not None
    assert best.change == "engine.name=ddp"
    config = replace(CONFIG, engine=replace(CONFIG.engine, name="ddp"))
    assert best.step.total == pytest.approx(scaled(config, gpus=(64,)).points[0].step.total)
    assert all(best.pairs_per_second >= point.pairs_per_second for point in result.alternatives if point.keeps_batch)
    layouts = {p.cluster.ranks_per_node: p.step.exposed for p in result.alternatives if "devices" in p.change}
    assert layouts[1] > layouts[2] > layouts[4] > result.points[0].step.exposed


def test_numbers_of_gpus_may_have_any_order_and_repeat():
    assert [point.cluster.ranks for point in scaled(gpus=(2, 1, 2)).points] == [1, 2]


def test_settings_that_the_engine_cannot_combine_are_not_proposed():
    def proposed(**engine: Any) -> set[str]:
        changed = replace(CONFIG, engine=EngineConfig(**engine))
        return {name for name, _ in scaling._changed_settings(changed, 512, 512)}

    assert "engine.zero_stage=3" in proposed(precision="bf16")
    assert "engine.zero_stage=3" not in proposed(precision="fp8")
    assert "engine.zero_stage=3" in proposed(precision="fp8", grad_checkpointing=True)
    assert "engine.grad_checkpointing=false" not in proposed(precision="fp8", grad_checkpointing=True, zero_stage=3)

    small = cluster_of(replace(H100, devices_per_node=1, memory_gib=0.01))
    for engine in (EngineConfig(name="ddp", compile=True, cuda_graphs=True), EngineConfig(offload_optimizer=True)):
        config = replace(CONFIG, engine=replace(engine, precision="bf16"))
        savers = {name for name, _ in command._memory_savers(config, small)}
        assert savers
        assert not savers & {"engine.grad_checkpointing=true" if engine.cuda_graphs else "engine.zero_stage=0"}


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        ({"gpus": (12,)}, "12 GPUs do not fill nodes of 8"),
        ({"gpus": (8192,), "keep": "global"}, "8192 GPUs cannot share a batch of 4096"),
        ({"gpus": (0,)}, "must be at least 1"),
        ({"keep": "all"}, "scale.keep=all must be rank or global"),
    ],
)
def test_impossible_scale_is_an_error(scale: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        scaled(**scale)


def loader_plan(config: TrainConfig, images_per_second: float) -> loader.LoaderPlan:
    cluster = cluster_of(config.cluster)
    plan = loader.plan_loader(config, cluster, PMC_15M, 1000, 1000 / images_per_second)
    loader.check_loader(config, cluster, PMC_15M, plan)
    return plan


def test_slow_loader_is_refused_with_remedies():
    refusing = replace(H100, allow_slow_loader=False, core_images_per_s=500)
    config = replace(CONFIG, cluster=refusing, data=DataConfig(num_threads=2))
    assert loader_plan(config, 900).cores == pytest.approx(1.8)
    with pytest.raises(UserError) as error:
        loader_plan(config, 3000)
    for words in ("3,000 images/s", "makes 1,000", "data.num_threads=6 of the 14", "data.loader=dali", "384"):
        assert words in str(error.value)
    with pytest.raises(UserError, match="nodes with 160 cores"):
        loader_plan(config, 9900)
    assert loader_plan(replace(config, data=DataConfig(num_threads=6)), 3000).capacity == 3000
    assert loader_plan(replace(config, data=DataConfig(loader="dali")), 6000).source.endswith("NOT MEASURED")
    assert loader_plan(replace(config, cluster=replace(refusing, allow_slow_loader=True)), 9000).is_loader_slow
    on_cpu = replace(config, cluster=ClusterConfig(device="cpu", core_images_per_s=500))
    assert loader_plan(on_cpu, 1e6).is_loader_slow


def test_slow_storage_is_refused():
    config = replace(CONFIG, cluster=replace(H100, allow_slow_loader=False, core_images_per_s=1e4, storage_gb_per_s=1))
    # 80 kB an image and 8 GPUs a node: 0.64 and 1.28 GB/s.
    assert loader_plan(config, 1000).needed_bytes == pytest.approx(80e6)
    with pytest.raises(UserError, match=r"reads 1.28 GB/s, but cluster.storage_gb_per_s=1"):
        loader_plan(config, 2000)


def test_core_rate_comes_from_the_loader_benchmark_and_the_size_of_images():
    cluster = cluster_of(H100)
    measured, source = loader.core_rate(cluster, replace(PMC_15M, image_bytes=loader.BENCHMARK_BYTES), 0)
    assert measured is not None
    assert "not on the planned nodes" in source
    halved, source = loader.core_rate(cluster, replace(PMC_15M, image_bytes=2 * loader.BENCHMARK_BYTES), 0)
    assert halved == pytest.approx(measured / 2)
    assert "divided by 2.00" in source
    assert loader.core_rate(cluster, replace(PMC_15M, image_bytes=1000), 0)[0] == measured


@pytest.mark.parametrize("setting", ["micro_batch_tokens", "micro_batch_size"])
def test_largest_micro_batch_fits_and_the_next_does_not(setting: str):
    peak = plan_of(replace(CONFIG, micro_batch_size=64)).peak
    cluster = cluster_of(replace(H100, memory_gib=1.0001 * peak / GIB))
    config = replace(CONFIG, **{setting: 64}).resolved()  # type: ignore[arg-type]
    name, largest = micro_batches.largest_micro_batch(config, PMC_15M, cluster, [4096])
    assert name == setting

    def fits(value: int) -> bool:
        changed = replace(config, **{setting: value})  # type: ignore[arg-type]
        return estimate.fits(changed, PMC_15M, cluster, estimate.stage_of(changed, PMC_15M, cluster, 4096))

    assert largest >= 64
    assert fits(largest)
    assert not fits(2 * largest if setting == "micro_batch_size" else round(1.1 * largest))


def test_plan_of_a_run_without_gain_from_a_larger_batch_says_as_many_pairs():
    table = scaled(gpus=(8,))
    now = table.points[0]
    for factor, words in (
        (1.0, "about as many pairs"),
        (1.1, "10% more pairs"),
        (0.9, "10% fewer pairs"),
    ):
        step = StepTime({"forward": 2 * now.step.total / factor}, [])
        stage = replace(now.stage, rank_batch=2 * now.stage.rank_batch)
        table.alternatives = [replace(now, stage=stage, step=step, change="batch_size=2", keeps_batch=False)]
        assert words in scale_report.best_lines(table)[-1]


def test_plan_prints_scale_and_loader(tmp_path: Any, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.toml").write_text(config_files.to_toml(replace(CONFIG, micro_batch_size=512)))
    command = ["plan", str(tmp_path / "config.toml"), "--scale.gpus", "8", "64"]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    for words in (
        "NOT MEASURED: milliseconds a step",
        "images/s a rank are needed",
        "Its rate is unknown: set cluster.storage_gb_per_s",
        "Best  ",
        "is the largest that fits",
    ):
        assert words in shown
    assert cli.main([*command, "--micro_batch_size", "0", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    points = content["scale"]["points"]
    assert [point["gpus"] for point in points] == [8, 64]
    assert 0 < points[1]["efficiency"] < points[0]["efficiency"] < 1
    assert points[0]["communication"]["text features, loss"]["bytes"] == 4096 * CONFIG.model.embed_dim * 2
    assert content["loader"]["needed"] > 0
    refusing = replace(CONFIG, cluster=replace(H100, allow_slow_loader=False))
    (tmp_path / "config.toml").write_text(config_files.to_toml(refusing))
    assert cli.main(command[:2]) == 2
    assert "the loader cannot keep up" in capsys.readouterr().err
