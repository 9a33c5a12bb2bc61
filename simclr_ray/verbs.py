"""What each verb of the command line does: it calls the function of the same name, and says what came of it.

Imports are inside, for a verb should not wait for what only others need.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping

from simclr_ray.configure import load_config, schema, to_yaml, use_storage
from simclr_ray.errors import ConfigError
from simclr_ray.observe.console import Console


def pretrain(options: argparse.Namespace) -> None:
    """Run `simclr-ray pretrain`."""
    from simclr_ray.api import pretrain

    result = pretrain(options.config, options.set, fresh=options.fresh)
    Console().say(f"encoder: {result.folder}")


def tune(options: argparse.Namespace) -> None:
    """Run `simclr-ray tune`."""
    from simclr_ray.search.tune import tune

    tune(options.config, options.space, options.folder, options.set)


def distill(options: argparse.Namespace) -> None:
    """Run `simclr-ray distill`."""
    from simclr_ray.api import distill

    result = distill(
        options.teacher,
        options.config,
        options.set,
        classifier=options.classifier,
        temperature=options.temperature,
        labels=options.labels,
        fresh=options.fresh,
    )
    Console().say(f"student: {result.folder}")


def evaluate(options: argparse.Namespace) -> None:
    """Run `simclr-ray evaluate`."""
    from simclr_ray.evaluate.evaluate import evaluate

    evaluate(options.run, options.set, pictures=not options.no_pictures)


def pack(options: argparse.Namespace) -> None:
    """Run `simclr-ray pack`."""
    from simclr_ray.api import pack
    from simclr_ray.data.shrink import Shrink

    _reach_stores(options)
    console = Console()
    report = pack(
        options.source,
        options.destination,
        labels=options.labels,
        seed=options.seed,
        shard_bytes=options.shard_mib << 20,
        kind=options.kind,
        column=options.column,
        label_column=options.label_column,
        encode=Shrink(options.short_side, options.quality) if options.short_side is not None else None,
        deduplicate=options.deduplicate,
        distance=options.distance,
        address=options.address,
    )
    manifest = report.manifest
    console.say(f"packed {manifest.rows:,} images into {len(manifest.shards)} shards: {manifest.folder}")
    if report.encoded_anew:
        console.say(f"encoded {report.encoded_anew:,} anew")
    if report.duplicates:
        console.say(f"left out {report.duplicates:,} duplicates; listed in {manifest.folder}/duplicates.parquet")
    _say_rejected(console, report.rejected, manifest.folder)


def index(options: argparse.Namespace) -> None:
    """Run `simclr-ray index`."""
    from simclr_ray.api import index

    _reach_stores(options)
    console = Console()
    report = index(
        options.source,
        options.destination,
        labels=options.labels,
        seed=options.seed,
        kind=options.kind,
        column=options.column,
        label_column=options.label_column,
        address=options.address,
    )
    manifest = report.manifest
    console.say(f"indexed {manifest.rows:,} images in {len(manifest.shards)} shards: {manifest.folder}")
    for name, words in (("empty", "empty shards"), ("without_image", "samples without an image"),
                        ("too_large", "samples with too large an image")):  # fmt: skip
        if report.counts.get(name):
            console.say(f"skipped {report.counts[name]:,} {words}")
    for note in report.notes:
        console.say(note)
    _say_rejected(console, report.rejected, manifest.folder)


def _say_rejected(console: Console, rejected: Mapping[str, int], folder: str) -> None:
    if rejected:
        reasons = ", ".join(f"{count} {reason}" for reason, count in rejected.items())
        console.say(f"left out {sum(rejected.values())}: {reasons}; listed in {folder}/rejected.parquet")


def _reach_stores(options: argparse.Namespace) -> None:
    """Apply storage settings for verbs that take no configuration file."""
    wrong = [text for text in options.set if not text.strip().startswith("storage.")]
    if wrong:
        raise ConfigError("only storage.* can be set here", got=", ".join(wrong))
    use_storage(load_config(None, options.set))


def preview(options: argparse.Namespace) -> None:
    """Run `simclr-ray preview`."""
    from simclr_ray.api import preview

    console = Console()
    for line in preview(options.config, options.set, output=options.output, images=options.images):
        console.say(line)
    console.say(f"sheet: {options.output}")


def check(options: argparse.Namespace) -> None:
    """Run `simclr-ray check`."""
    from simclr_ray.train.check import run_check

    run_check(options.config, options.set, Console().say)


def report(options: argparse.Namespace) -> None:
    """Run `simclr-ray report`."""
    from simclr_ray.api import report

    console = Console()
    written = report(
        options.runs, options.output, images=not options.no_images, embedded=options.embedded, umap=options.umap,
        recipe=options.recipe, overrides=options.set, say=console.say,
    )  # fmt: skip
    console.say(f"report: {written}")


def runs(options: argparse.Namespace) -> None:
    """Run `simclr-ray runs`."""
    from simclr_ray.publish.runs_verb import runs

    _reach_stores(options)
    runs(options.what, options.folders, by=options.by, as_json=options.json, console=Console())


def env(options: argparse.Namespace) -> None:
    """Run `simclr-ray env`."""
    from simclr_ray.publish.environment import environment_block

    Console().block(environment_block())


def embed(options: argparse.Namespace) -> None:
    """Run `simclr-ray embed`."""
    from simclr_ray.api import embed

    _reach_stores(options)
    console = Console()
    report = embed(
        options.run,
        options.data_set,
        options.out,
        dtype=options.dtype,
        precision=options.precision,
        step=options.step,
        rows_per_file=options.rows_per_file,
        actors=_fewest_and_most(options.actors),
        use_gpu=options.gpu,
        cpus_per_actor=options.cpus_per_actor,
        address=options.address,
        say=console.say,
    )
    console.say(f"embedded {report.rows:,} images as vectors of {report.width}: {report.folder}")
    _say_rejected(console, report.rejected, report.folder)


def _fewest_and_most(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    fewest, _, most = text.partition(":")
    try:
        return int(fewest), int(most or fewest)
    except ValueError:
        raise ConfigError("not a number of actors", where="--actors", got=text, expected="N, or FEWEST:MOST") from None


def neighbours(options: argparse.Namespace) -> None:
    """Run `simclr-ray neighbours`."""
    from simclr_ray.api import neighbours

    _reach_stores(options)
    for one in neighbours(options.folder, image=options.image, sample_id=options.id, k=options.k, run=options.run):
        label = "" if one.label is None else f"  label {one.label}"
        Console().say(f"{one.similarity:.4f}  id {one.sample_id}{label}  {one.uri}")


def export(options: argparse.Namespace) -> None:
    """Run `simclr-ray export`."""
    from simclr_ray.api import export

    _reach_stores(options)
    report = export(
        options.run, options.folder, format=options.format, step=options.step, projector=options.projector,
        licence=options.licence,
    )  # fmt: skip
    Console().say(f"exported {', '.join(report.files)}: {report.folder}")
    Console().say(f"outputs differ from the run's by {report.difference:.1e} of the largest at most")


def import_run(options: argparse.Namespace) -> None:
    """Run `simclr-ray import`."""
    from simclr_ray.api import import_weights

    _reach_stores(options)
    report = import_weights(
        options.file, options.run, layout=options.layout, size=options.size, flavour=options.flavour,
        max_pool=options.max_pool,
    )  # fmt: skip
    what = "with its projector" if report.projector else "without a projector"
    Console().say(f"imported {report.encoder}, {what}: {report.folder}")
    if report.left_out:
        Console().say(f"left out {len(report.left_out)} tensors, such as {report.left_out[0]}")


def fetch_data(options: argparse.Namespace) -> None:
    """Run `simclr-ray fetch-data`."""
    from simclr_ray.data.fetch import fetch_data

    _reach_stores(options)
    for manifest in fetch_data(
        options.name, options.destination, source=options.source, train=options.train, test=options.test
    ):
        Console().say(f"{manifest.rows:,} images, licence {manifest.source['licence']}: {manifest.folder}")


def config(options: argparse.Namespace) -> None:
    """Run `simclr-ray config`."""
    console = Console()
    if options.schema:
        console.block(json.dumps(schema(), indent=1))
        return
    config = load_config(options.config, options.set)
    use_storage(config)
    console.block(to_yaml(config.model_dump(mode="json")).rstrip())
    if config.data.train:
        from simclr_ray.data.manifest import read_manifest
        from simclr_ray.train.derive import derive, sentences

        for line in sentences(config, derive(config, read_manifest(config.data.train))):
            console.say(f"# {line}")
