"""The verbs as functions: what the command line calls, for use from Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from simclr_ray.config import ClusterConfig
from simclr_ray.configure import ConfigSource
from simclr_ray.data.decode import Limits
from simclr_ray.data.dedupe import Deduplicate
from simclr_ray.data.fetch import fetch_data
from simclr_ray.data.index import IndexOptions, IndexReport
from simclr_ray.data.index import index as _index
from simclr_ray.data.pack import PackReport
from simclr_ray.data.pack import pack as _pack
from simclr_ray.data.shrink import Shrink
from simclr_ray.data.sources import Labels, SourceKind
from simclr_ray.evaluate.encode import load_encoder
from simclr_ray.evaluate.evaluate import evaluate
from simclr_ray.evaluate.online import online_evaluation
from simclr_ray.evaluate.preview import preview
from simclr_ray.publish.distill import distill
from simclr_ray.publish.embed import EmbedReport
from simclr_ray.publish.embed import embed as _embed
from simclr_ray.publish.embed_folder import EmbedOptions
from simclr_ray.publish.embed_part import Precision
from simclr_ray.publish.export import export
from simclr_ray.publish.import_weights import ImportReport, import_weights
from simclr_ray.publish.neighbours import Neighbour, neighbours
from simclr_ray.publish.parts import Dtype
from simclr_ray.publish.report import report
from simclr_ray.train.cluster import connected
from simclr_ray.train.pretrain import RunResult
from simclr_ray.train.pretrain import pretrain as _pretrain

__all__ = [
    "EmbedReport", "ImportReport", "Neighbour", "RunResult", "distill", "embed", "evaluate", "export", "fetch_data",
    "import_weights", "index", "load_encoder", "neighbours", "pack", "pretrain", "preview", "report",
]  # fmt: skip


def pretrain(config: ConfigSource = None, overrides: Sequence[str] = (), *, fresh: bool = False) -> RunResult:
    """Train an encoder, or continue; see `simclr_ray.train.pretrain.pretrain`.

    Args:
        config: A YAML file, a mapping, or a `Config`.
        overrides: Such as `["train.global_batch=512"]`, applied on top.
        fresh: Remove what an earlier run left in `run.folder` and start again.

    Raises:
        ConfigError: a setting cannot work, or another driver holds the run folder.
        DataError: the data set is missing, broken or changed, or too many images were rejected.
        ClusterError: Ray, its resources or its workers failed for good.
        StorageError: the run folder cannot be read or written.
        NumericsError: the loss or a gradient is not finite.
    """
    return _pretrain(config, overrides, fresh=fresh, beside=online_evaluation)


def pack(
    source: str,
    destination: str,
    *,
    labels: Labels = "none",
    seed: int = 0,
    shard_bytes: int = 256 << 20,
    limits: Limits | None = None,
    kind: SourceKind | None = None,
    column: str | None = None,
    label_column: str = "label",
    encode: Shrink | None = None,
    deduplicate: Deduplicate = "none",
    distance: int = 4,
    address: str | None = None,
) -> PackReport:
    """Pack images into shards and a manifest; see `simclr_ray.data.pack.pack`. Starts Ray where none runs.

    Args:
        source: Folder of images, tars or Parquet files, a list of them, or a data set.
        destination: Empty or absent folder, or one in which the same pack was begun.
        labels: Where labels come from.
        seed: Of the shuffle.
        shard_bytes: Wanted size of a shard.
        limits: What an image may be.
        kind: Take only files of this kind.
        column: Column of the images, or of a list's addresses.
        label_column: Column of a Parquet file that holds its labels.
        encode: Make images smaller.
        deduplicate: Leave out images that are there already.
        distance: Most bits in which the hashes of the same picture differ.
        address: Of a running Ray cluster; None uses RAY_ADDRESS or starts a local one.

    Raises:
        DataError: nothing to read, or no image among it.
        ConfigError: the destination is not empty, or the source is ambiguous.
    """
    return _pack(
        source,
        destination,
        labels=labels,
        seed=seed,
        shard_bytes=shard_bytes,
        limits=limits,
        kind=kind,
        column=column,
        label_column=label_column,
        encode=encode,
        deduplicate=deduplicate,
        distance=distance,
        ray_ready=lambda: connected(ClusterConfig(address=address)),
    )


def index(
    source: str,
    destination: str,
    *,
    labels: Labels = "none",
    seed: int = 0,
    kind: SourceKind | None = None,
    column: str | None = None,
    label_column: str = "label",
    address: str | None = None,
) -> IndexReport:
    """Write a manifest over images where they lie; see `simclr_ray.data.index.index`. Starts Ray where none runs.

    Args:
        source: Folder of images, tars or Parquet files, or a list of them.
        destination: Empty or absent folder for the manifest, or one in which the same index was begun.
        labels: Where labels come from.
        seed: Of the order of loose images.
        kind: Take only files of this kind.
        column: Column of the images, or of a list's addresses.
        label_column: Column of a Parquet file that holds its labels.
        address: Of a running Ray cluster; None uses RAY_ADDRESS or starts a local one.

    Raises:
        DataError: nothing to read, none of it readable, or samples of a tar are not told apart by their keys.
        ConfigError: the destination is not empty, or the source is ambiguous.
    """
    options = IndexOptions(kind, column, labels, label_column, seed)
    return _index(source, destination, options, ray_ready=lambda: connected(ClusterConfig(address=address)))


def embed(
    run: str,
    data_set: str,
    out: str,
    *,
    dtype: Dtype = "float16",
    precision: Precision = "fp32",
    step: int | None = None,
    rows_per_file: int | None = None,
    actors: tuple[int, int] | None = None,
    use_gpu: bool | None = None,
    cpus_per_actor: int = 1,
    address: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> EmbedReport:
    """Embed every image of a data set; see `simclr_ray.publish.embed.embed`. Starts Ray where none runs.

    Args:
        run: The run folder of the encoder.
        data_set: Folder of a packed or indexed data set.
        out: Empty or absent folder, or one in which the same work was begun.
        dtype: Of the stored vectors.
        precision: Of the encoder while it computes.
        step: Checkpoint; None takes the newest.
        rows_per_file: Images of a file; None: about 4096.
        actors: Fewest and most of them; None: what the cluster has room for.
        use_gpu: A GPU for each actor; None: where the cluster has one.
        cpus_per_actor: Threads of an actor.
        address: Of a running Ray cluster; None uses RAY_ADDRESS or starts a local one.
        say: Told how it goes.

    Raises:
        ConfigError: no run here, or the folder holds another work.
        DataError: the data set is missing or changed.
        StorageError: the run has no valid checkpoint, or a store fails.
    """
    options = EmbedOptions(dtype, precision, step, rows_per_file, actors, use_gpu, cpus_per_actor)
    return _embed(run, data_set, out, options, address=address, say=say)
