"""Derived numbers, and the sentences for settings that cannot work."""

from __future__ import annotations

from dataclasses import fields

import pytest

from simclr_ray.configure import load_config
from simclr_ray.data.decode import Limits
from simclr_ray.data.manifest import Manifest, Shard
from simclr_ray.errors import ClusterError, ConfigError
from simclr_ray.train.cluster import local_cpus, resolve_views, resolve_workers
from simclr_ray.train.derive import check_world_size, derive, limits_of, policy_of, sentences, shares


def manifest(rows: int) -> Manifest:
    groups = tuple(min(64, rows - start) for start in range(0, rows, 64))
    return Manifest("/data", (Shard("s", "parquet", "e", 1, groups),))


def test_the_numbers_of_a_run() -> None:
    config = load_config({"train": {"global_batch": 256, "epochs": 10}, "optim": {"warmup_epochs": 1}})
    derived = derive(config, manifest(1000))
    assert (derived.units_per_epoch, derived.rows_left_out, derived.units_per_step) == (15, 40, 4)
    assert derived.steps_per_epoch == 960 / 256
    assert (derived.total_steps, derived.warmup_steps) == (38, 4)
    assert derived.negatives_per_anchor == 510
    assert derived.peak_learning_rate == pytest.approx(0.3)
    text = "\n".join(sentences(config, derived))
    assert "40 left out" in text
    assert "510 negatives" in text


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        (100, ["train.global_batch=128"], ["one global batch needs more images", "100 in /data", "global_batch=64"]),
        (30, ["train.global_batch=64"], ["pack more images"]),
        (1000, ["train.global_batch=100"], ["use 64 or 128"]),
        (1000, ["train.global_batch=384", "train.micro_batch=256"], ["train.micro_batch", "256", "use 128 or 192"]),
        (1000, ["train.global_batch=384", "train.micro_batch=60"], ["train.micro_batch", "use 64 or 128"]),
        (1000, ["train.global_batch=64", "optim.warmup_epochs=20"], ["warm-up", "leaves nothing"]),
    ],
)
def test_what_does_not_fit_the_data_set_is_refused_with_the_fix(
    rows: int, changes: list[str], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        derive(load_config(None, ["train.epochs=10", *changes]), manifest(rows))
    for word in words:
        assert word in str(caught.value)


def test_a_length_must_be_given() -> None:
    with pytest.raises(ConfigError, match=r"neither train\.epochs nor train\.steps"):
        derive(load_config(None, ["train.global_batch=64"]), manifest(1000))


def test_any_number_of_workers_up_to_the_units_of_a_step_works() -> None:
    derived = derive(
        load_config(None, ["train.global_batch=256", "train.steps=99", "optim.warmup_epochs=1"]), manifest(1000)
    )
    assert list(shares(derived, 3)) == [128, 64, 64]
    for world_size in (1, 2, 3, 4):
        check_world_size(world_size, derived)
        assert sum(shares(derived, world_size)) == 256
    with pytest.raises(ConfigError, match="1 to 4"):
        check_world_size(5, derived)


def test_every_worker_needs_a_unit_of_every_micro_batch() -> None:
    settings = ["train.global_batch=256", "train.micro_batch=128", "train.steps=99", "optim.warmup_epochs=1"]
    config = load_config(None, settings)
    derived = derive(config, manifest(1000))
    assert (derived.units_per_step, derived.units_per_micro_batch) == (4, 2)
    assert "micro-batches: 2 of 128 images a step" in "\n".join(sentences(config, derived))
    check_world_size(2, derived)
    with pytest.raises(ConfigError, match=r"a micro-batch has 2 units.*\n.*train\.micro_batch=192"):
        check_world_size(3, derived)


def test_workers_never_take_the_last_cpu_of_the_stream() -> None:
    config = load_config(None, ["cluster.workers=4"]).cluster
    assert resolve_workers(config, {"CPU": 5.0}) == (4, False)
    assert local_cpus(config) >= 5
    with pytest.raises(ClusterError, match=r"cluster\.workers=3"):
        resolve_workers(config, {"CPU": 4.0})


def test_gpus_are_used_where_there_are_some() -> None:
    config = load_config(None).cluster
    assert resolve_workers(config, {"CPU": 16.0, "GPU": 8.0}) == (8, True)
    with pytest.raises(ClusterError, match="GPU each"):
        resolve_workers(load_config(None, ["cluster.use_gpu=true"]).cluster, {"CPU": 16.0})


@pytest.mark.parametrize(
    ("where", "cpus", "gpus", "expected"),
    [
        ("auto", 4, 0, "cpu"),
        ("auto", 40, 8, "cpu"),
        ("auto", 16, 8, "gpu"),
        ("gpu", 64, 1, "gpu"),
        ("cpu", 9, 8, "cpu"),
    ],
)
def test_the_gpu_does_the_colours_where_cpus_are_few(where: str, cpus: int, gpus: int, expected: str) -> None:
    resources = {"CPU": float(cpus), "GPU": float(gpus)}
    got, why = resolve_views(
        where,  # type: ignore[arg-type]
        load_config(None).cluster,
        resources,
        workers=max(1, gpus),
        use_gpu=gpus > 0,
        maker="kernel",
    )
    assert got == expected
    assert why


@pytest.mark.parametrize("gpus", [0, 2])
def test_colours_are_left_to_workers_without_a_gpu_if_asked_and_the_words_say_what_that_means(gpus: int) -> None:
    resources = {"CPU": 8.0, "GPU": float(gpus)}
    config = load_config(None, ["cluster.use_gpu=false"]).cluster
    where, why = resolve_views("gpu", config, resources, workers=1, use_gpu=False, maker="kernel")
    assert where == "gpu"
    assert f"Ray offers {gpus}" in why
    assert "on its own CPUs" in why
    assert "views.where=cpu" in why


def test_a_policy_is_the_preset_with_what_the_config_sets() -> None:
    policy = policy_of(load_config(None, ["views.preset=cifar", "views.crop_scale_min=0.3", "views.size=28"]).views)
    assert policy.crop_scale == (0.3, 1.0)
    broad = policy_of(load_config(None, ["views.preset=imagenet-broad", "views.flavour=paper"]).views)
    assert (broad.flavour, broad.solarize_probability, broad.mean) == ("paper", 0.2, None)
    assert policy_of(load_config(None, ["views.solarize_probability=0.5"]).views).solarize_probability == 0.5
    assert (policy.size, policy.blur_probability, policy.brightness) == (28, 0.0, 0.4)


def test_every_limit_of_decoding_is_a_setting_with_the_same_default() -> None:
    assert limits_of(load_config(None).data) == Limits()
    changes = {
        "max_pixels": 9000, "max_side": 300, "min_side": 8, "max_bytes": 7000, "background": (0, 127, 255),
        "animated": "reject",
    }  # fmt: skip
    assert set(changes) == {field.name for field in fields(Limits)}
    assert limits_of(load_config({"data": changes}).data) == Limits(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.background=[0, 0]", "data.background"),
        ("data.background=[0, 0, 256]", "data.background.2: got 256, expected less than or equal to 255"),
        ("data.background=[-1, 0, 0]", "data.background.0: got -1, expected greater than or equal to 0"),
        ("data.max_side=1", "data.max_side: got 1, expected at least data.min_side, 2"),
        ("data.max_bytes=0", "data.max_bytes: got 0, expected greater than or equal to 1"),
    ],
)
def test_limits_that_cannot_work_are_refused(change: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [change])
    assert words in str(caught.value)
