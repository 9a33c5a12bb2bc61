"""The whole configuration, as typed sections. One YAML file, one validation, no hidden numbers.

The docstring under a field is its help text and its description in the JSON schema, so an editor can complete the
YAML. A section checks only itself; checks across sections are in `configure.cross_checks`, and numbers that follow
from the data set and the world size are in `train.derive`. A value left at null is derived, printed and written to
`resolved.yaml`. There is no `batch_size`: the global batch is images per optimizer step over all ranks, and a
rank's share of it follows from the world size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationInfo, field_validator

from simclr_ray.storage.settings import StorageSettings, endpoint_problem

Fraction = Annotated[float, Ge(0), Le(1)]
Count = Annotated[int, Ge(1)]
Level = Annotated[int, Ge(0), Le(255)]
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
LabelKey = Annotated[str, StringConstraints(pattern=rf"^(?:[a-z0-9.-]+/)?{_LABEL}$")]
LabelValue = Annotated[str, StringConstraints(pattern=rf"^!?(?:{_LABEL}|in\({_LABEL}(?:, ?{_LABEL})*\))$")]
Labels = Mapping[LabelKey, LabelValue]
"""What a node's labels must be, in Ray's words (a label selector)."""


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, finite numbers only."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )


class RunConfig(Section):
    """Where a run lives and what makes it this run and no other."""

    folder: str | None = None
    """Run folder, a local path or an s3:// URI. Rerunning a command with the same folder continues the run."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    """Address of all randomness: sample order, views and initial weights."""


class DataConfig(Section):
    """Where the images are and how they are read."""

    train: str | None = None
    """Folder (or URI) of a packed data set with its manifest; labels are never read for pretraining."""
    max_pixels: Annotated[int, Ge(1), Le(178_956_970)] = 50_000_000
    """Images with more pixels than this are rejected from their header, before decoding."""
    min_side: Count = 2
    """Images with a shorter side than this, in pixels, are rejected."""
    max_side: Count = 20_000
    """Images with a longer side than this, in pixels, are rejected."""
    max_bytes: Count = 100_000_000
    """Images of more bytes than this, encoded, are rejected unread."""
    background: tuple[Level, Level, Level] = (255, 255, 255)
    """Red, green and blue, 0 to 255, that show through transparent pixels."""
    animated: Literal["first_frame", "reject"] = "first_frame"
    """What a GIF, WebP or PNG of several frames gives; those of which one was taken are counted."""
    max_rejected_fraction: Fraction = 0.01
    """The run stops (exit 3) when more than this fraction of the last `rejected_window` samples was rejected."""
    rejected_window: Count = 100_000
    """Number of samples over which `max_rejected_fraction` is taken."""
    units_per_task: Count = 8
    """Consecutive units one Ray task reads, decodes and augments; aim at 0.5-2 s of work a task."""
    units_per_segment: Count = 40_000
    """Units in one Ray Data execution. More mean fewer restarts of the stream, but a longer start of each."""
    steps_ahead: Count = 8
    """Steps whose views the stream may have ready in the object store, and no more."""
    prefetch_units: Count = 8
    """Finished units each rank holds ready."""

    @field_validator("max_side")
    @classmethod
    def _some_side_is_allowed(cls, longest: int, others: ValidationInfo) -> int:
        shortest = others.data.get("min_side", 1)
        if longest < shortest:
            raise ValueError(f"at least data.min_side, {shortest}")
        return longest


class ViewsConfig(Section):
    """Augmentation policy: a preset, and what differs from it."""

    preset: Literal["imagenet", "imagenet-broad", "cifar"] = "imagenet"
    """`imagenet`: 224 px, strength 1, blur. `imagenet-broad`: solarizes too. `cifar`: 32 px, strength 0.5, no blur
    (SimCLR B.9)."""
    flavour: Literal["torchvision", "paper"] = "torchvision"
    """`torchvision`: what PyTorch's results used. `paper`: the operations of Google's code (contrast by channel,
    saturation in HSV, bicubic without antialiasing, no normalisation)."""
    size: Annotated[int, Ge(8), Le(1024)] | None = None
    """Side of a view in pixels; null takes the preset's."""
    strength: Annotated[float, Ge(0), Le(2)] | None = None
    """Colour jitter strength s: brightness, contrast and saturation 0.8 s, hue 0.2 s; null takes the preset's."""
    crop_scale_min: Annotated[float, Gt(0), Le(1)] | None = None
    """Smallest crop, as a fraction of the image's area; null takes the preset's 0.08."""
    flip_probability: Fraction | None = None
    """Probability of a horizontal flip; null takes the preset's 0.5."""
    jitter_probability: Fraction | None = None
    """Probability that a view's colours are jittered; null takes the preset's 0.8."""
    grayscale_probability: Fraction | None = None
    """Probability that a view loses its colour; null takes the preset's 0.2."""
    blur_probability: Fraction | None = None
    """Probability of a Gaussian blur; null takes the preset's."""
    solarize_probability: Fraction | None = None
    """Probability that levels from 128 up are inverted, last of all; null takes the preset's."""
    where: Literal["auto", "cpu", "gpu"] = "auto"
    """Who does the colours: `cpu`, the stream's tasks, which then make finished views; `gpu`, the train workers on
    their devices, while the stream decodes and crops. The pictures are the same, up to rounding by 1 level. `auto`:
    `gpu` where there are GPUs with fewer than 3 CPUs each left for the stream."""
    scaled_decode: bool = True
    """Decode a JPEG at a half, a quarter or an eighth of its size where both crops still have the view's pixels then.
    Images of 900 pixels and more gain (views of 224); theirs differ by 0.2 to 0.4 levels of 255 in the mean. Never in
    flavour `paper`."""


class ModelConfig(Section):
    """Encoder f and projector g."""

    encoder: Literal["small", "resnet18", "resnet50"] = "resnet50"
    """`small` has 0.3 M parameters and trains on a CPU in minutes."""
    width: Literal[1, 2, 4] = 1
    """Multiplies every channel count, stem included: SimCLR's 1x, 2x, 4x."""
    stem: Literal["imagenet", "cifar", "imagenet-same"] = "imagenet"
    """`cifar`: 3x3 convolution of stride 1 and no max pooling, for images of 32 px. `imagenet-same`: max pooling pads
    as TensorFlow's SAME does, below and right alone for even sizes: for weights of Google's code."""
    zero_init_last: bool = True
    """Start each residual block as the identity (last batch-norm gamma at zero)."""
    projector_layers: Annotated[int, Ge(1), Le(4)] = 2
    """Dense layers of the projector: 2 in SimCLR v1, 3 in v2."""
    projector_hidden: Count | None = None
    """Width of the projector's hidden layers; null takes the encoder's."""
    projection_dim: Count = 128
    """Dimension of a projection z."""
    batch_norm: Literal["global", "local", "frozen"] = "global"
    """`global`: statistics over all ranks and both views, as SimCLR has it (with `train.micro_batch`, over one
    micro-batch). `local`: each rank alone; the loss curve then depends on the number of workers. `frozen`: taken
    from the first global batch under the initial weights (mean over its micro-batches) and kept for good; under
    them images do not meet in batch norm, so a step's gradient does not depend on how it is cut."""


class LossConfig(Section):
    """NT-Xent."""

    temperature: Annotated[float, Gt(0), Le(10)] = 0.1
    """Divides cosine similarities; smaller pushes hard negatives apart more strongly."""
    flavour: Literal["standard", "paper"] = "standard"
    """`standard`: the mean over anchors, Algorithm 1. `paper`: twice that, as Google's code has it; matters where the
    gradient's size does (batch norm and biases under LARS, weight decay, clipping)."""
    exchange: Literal["auto", "gather", "half", "ring"] = "auto"
    """How ranks share projections; the loss is the same. `gather`: every rank holds all. `half`: each pair of ranks
    computed once, for both; fewer FLOPs, twice the traffic. `ring`: they go round, no rank ever holds all. `auto`: ring
    above 4 GiB of projections, half on CPUs from 4 MiB (8192 of 128 numbers), else gather."""
    kernel: Literal["torch", "triton"] = "torch"
    """What computes the tiles of the similarity matrix. `triton` keeps them on the chip, on CUDA only; it is tested
    against `torch`, but has not been timed on a GPU yet, so it is not the default."""


class OptimConfig(Section):
    """Optimizer and learning-rate schedule, both counted in steps."""

    name: Literal["lars", "adamw"] = "lars"
    """`lars` is SimCLR's; `adamw` suits small batches and short runs."""
    rule: Literal["linear", "sqrt", "constant"] = "linear"
    """Peak learning rate from the base: `linear` base * B / 256, `sqrt` base * sqrt(B), `constant` base."""
    base_learning_rate: Annotated[float, Gt(0)] = 0.3
    """SimCLR: 0.3 with `linear`, 0.075 with `sqrt`; about 2e-3 with `constant` and adamw."""
    weight_decay: Annotated[float, Ge(0)] = 1e-6
    """Not applied to batch-norm parameters and biases."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Of LARS; the first beta of AdamW."""
    warmup_epochs: Annotated[float, Ge(0)] = 10.0
    """Epochs of linear warm-up from zero."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: `cosine` to zero at the last step, without restarts, or `constant`."""
    clip_gradient_norm: Annotated[float, Gt(0)] | None = None
    """Largest gradient norm; null never clips, as in the paper."""


class TrainConfig(Section):
    """How long, with what batch, and on what."""

    global_batch: Annotated[int, Ge(2)] = 4096
    """Images per optimizer step over all ranks; 2 B - 2 negatives for each of 2 B anchors."""
    epochs: Annotated[float, Gt(0)] | None = None
    """Passes over the data set. Give `epochs` or `steps`, not both."""
    steps: Count | None = None
    """Optimizer steps."""
    micro_batch: Count | None = None
    """Images that go through the encoder at a time, over all ranks; null: the whole global batch at once. For batches
    whose activations do not fit: the loss is still over the whole batch, at the cost of one more forward pass. Divides
    `global_batch`. Batch norm takes its statistics from one micro-batch, see `model.batch_norm`."""
    precision: Literal["fp32", "bf16"] | None = None
    """Of the encoder and projector; null: bf16 on GPUs, fp32 on CPUs. The loss is computed in fp32 always."""
    channels_last: bool = True
    """Memory format of images and weights; faster on GPUs, and by a fifth on CPUs too."""
    compile: bool = False
    """Compile the model with torch.compile."""
    log_every: Count = 10
    """Steps between two records of the metrics."""
    checkpoint_every: Count = 500
    """Steps between two checkpoints; the last step is always one."""
    checkpoint_every_s: Annotated[float, Gt(0)] | None = 900.0
    """And seconds between two, so that a run of slow steps loses no more than this; null: by steps alone."""
    max_failed_saves: Count = 3
    """Checkpoints in a row that may fail (a full disk, a store that is down) before the run stops (exit 4)."""
    on_nonfinite: Literal["stop", "rollback"] = "stop"
    """When the loss or a gradient is not finite: `stop` (exit 6), or go back to the newest checkpoint and leave out
    that step's images. Either way nothing of it reaches the weights, and the images are in `quarantine.parquet`."""
    stop_on_collapse: bool = False
    """Stop (exit 6) when all projections point the same way, instead of saying so and going on."""
    max_rollbacks: Count = 3
    """Steps that `on_nonfinite: rollback` may leave out over the whole run."""
    keep_checkpoints: Annotated[int, Ge(1)] = 3
    """Newest committed checkpoints to keep."""


class ClusterConfig(Section):
    """What to ask Ray for. Nothing here changes what is learned."""

    address: str | None = None
    """Address of a running Ray cluster; null uses RAY_ADDRESS, or else starts a local one."""
    workers: Count | None = None
    """Train workers (ranks); any number up to units per step. null: one per GPU of the cluster, or 1."""
    use_gpu: bool | None = None
    """One GPU a worker with NCCL, or CPU with gloo; null: GPU where the cluster has one."""
    cpus_per_worker: Annotated[float, Gt(0)] = 1.0
    """CPUs reserved for each train worker. At least `data_cpus` must remain, or the stream could never start."""
    data_cpus: Count = 1
    """CPUs that must stay free of train workers, for Ray Data."""
    train_labels: Labels | None = None
    """Labels of the nodes that train workers may run on, such as `{simclr-role: train}`; a value may be `!value` (any
    other), `in(a, b)` or `!in(a, b)`. null: any node."""
    data_labels: Labels | None = None
    """Labels of the nodes that reading, decoding and views may run on, such as `{ray-subcluster: data}`, so that they
    leave the CPUs of GPU nodes alone; with that key an autoscaler adds such nodes where the stream is too slow, see
    cluster/README.md. null: any node."""
    threads_per_worker: Count | None = None
    """Compute threads of a CPU train worker; null: the machine's cores shared among the workers on it."""
    min_workers: Count | None = None
    """Train with so few workers where `workers` cannot be had (a lost node), and grow again when they can; the curve is
    the same. null: always exactly `workers`."""
    resize_check_s: Annotated[float, Gt(0)] = 600.0
    """Seconds between two looks whether more workers can be had; growing goes back to the newest checkpoint."""
    max_failures: Annotated[int, Ge(0)] = 3
    """Restarts of the worker group before the run gives up (exit 5)."""
    max_preemptions: Annotated[int, Ge(-1)] = -1
    """Restarts because a node was taken away with notice, counted apart; -1: as many as come."""
    start_timeout_s: Annotated[float, Gt(0)] = 120.0
    """Longest wait for the workers' resources and start; minutes where an autoscaler must add nodes."""
    first_step_timeout_s: Annotated[float, Gt(0)] = 1800.0
    """Longest wait of a rank for the others in the first step of an attempt, in which libraries load, the stream starts
    and compilation happens."""
    collective_timeout_s: Annotated[float, Gt(0)] = 300.0
    """Longest wait of a rank for the others in all later steps, before the group is restarted."""


class StorageConfig(Section):
    """How object stores are reached. Credentials do not belong here: each machine finds its own by the usual chain."""

    endpoint: str | None = None
    """URL of an S3-compatible store; null takes AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, or else AWS itself."""
    region: Annotated[str, MinLen(1)] | None = None
    """Region that requests are signed for; null takes AWS_REGION or the profile's, or else us-east-1."""
    path_style: bool | None = None
    """Bucket in the URL's path (true) or in its host name (false); null: in the path where an endpoint is given."""
    anonymous: bool = False
    """Unsigned requests, for public buckets."""
    allow_http: bool = False
    """Read http:// and https:// URIs too. A list from elsewhere could then point into the cluster's own network."""
    deadline_s: Annotated[float, Gt(0), Le(86_400)] = 120.0
    """Longest time for one operation with all its retries; bodies above 16 MiB get as much for each 16."""
    connect_timeout_s: Annotated[float, Gt(0), Le(3600)] = 10.0
    """Longest wait for a connection."""
    read_timeout_s: Annotated[float, Gt(0), Le(3600)] = 30.0
    """Longest silence of the store in the middle of a request."""

    @field_validator("endpoint")
    @classmethod
    def _endpoint_can_work(cls, endpoint: str | None) -> str | None:
        if endpoint is not None and (problem := endpoint_problem(endpoint)):
            raise ValueError(f"a URL such as https://s3.example.org:9000; this one {problem}")
        return endpoint

    def settings(self) -> StorageSettings:
        """The same as `storage.configure` takes it."""
        return StorageSettings(**self.model_dump())


class EvaluateConfig(Section):
    """What is measured after training, on labelled images that pretraining never used as labels."""

    train: str | None = None
    """Labelled data set for the probes; null takes `data.train`."""
    test: str | None = None
    """Labelled data set for the accuracy."""
    num_labels: Count | None = 10_000
    """Labels the probes may use, balanced over the classes; null takes all."""
    seeds: Annotated[tuple[Annotated[int, Ge(0)], ...], MinLen(1)] = (0, 1, 2)
    """Seeds of the probe: each draws its own labelled subset and hold-out."""
    knn_k: Count = 20
    """Neighbours of the kNN classifier."""
    knn_temperature: Annotated[float, Gt(0)] = 0.07
    """Weight of a neighbour is exp(similarity / temperature)."""
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{0,64}$")] = ""
    """Of the labelled sets, for transfer to others than the run's own: results go to `eval/NAME`."""
    protocols: Annotated[tuple[Literal["probes", "sgd", "finetune", "finetune_v2"], ...], MinLen(1)] = ("probes",)
    """What is measured. `probes`: kNN, linear by L-BFGS, label-free numbers. `sgd`: the paper's linear probe on crops
    and flips (B.6). `finetune`: the whole network on a part of the labels (B.5). `finetune_v2`: as SimCLR v2 does it,
    the projector's first layer with it where only a part of the labels is used."""
    l2_grid: Literal["usual", "paper"] = "usual"
    """Penalties that the linear probe chooses from: `usual`, five; `paper`, the 45 of its transfer protocol (B.8)."""
    fractions: Annotated[tuple[Annotated[float, Gt(0), Le(1)], ...], MinLen(1)] = (0.01, 0.1, 1.0)
    """Parts of the labels that fine-tuning uses, balanced over the classes."""
    label_list: str | None = None
    """A published list of file names, a line each, whose labels fine-tuning uses in place of `fractions`."""
    supervised_batch: Count | None = None
    """Images of a step of training with labels; all labels where there are fewer. null: the papers', 4096, and 1024 of
    `finetune_v2`."""
    supervised_epochs: Count | None = None
    """Of training with labels; null: the papers', 90, and 60 with up to 2 % of the labels, else 30."""
    workers: Count | None = None
    """Ray actors that encode, each with a GPU where there are; null: this process alone."""
    every: Count | None = None
    """While training, measure the newest checkpoint about every so many steps, in a process of its own beside the run
    that no step waits for; see `eval/online.jsonl`. null: never."""
    online_images: Annotated[int, Ge(20)] = 2000
    """Images of `evaluate.train` that this takes, half to search in and half to ask with; never of the test set."""


class DistillConfig(Section):
    """Learning from a teacher in place of NT-Xent (SimCLR v2, arXiv 2006.10029); `simclr-ray distill` sets it."""

    teacher: str | None = None
    """Run folder of the teacher; null trains by NT-Xent."""
    classifier: str | None = None
    """File of the teacher's classifier, as `evaluate` writes it for protocols that train, inside the teacher's run."""
    digest: str | None = None
    """Of that file, so that a run never goes on with another teacher; `simclr-ray distill` sets it."""
    temperature: Annotated[float, Gt(0), Le(10)] = 1.0
    """Of both softmaxes: 1 from a larger teacher, 0.1 from one of the student's size."""
    labels: Literal["none", "teacher"] = "none"
    """Which labels the student sees too: `teacher`, those that the classifier was trained with (eq. 3); their data set
    is then the student's `data.train`."""
    alpha: Fraction = 0.5
    """Weight of the teacher beside those labels."""


class Config(Section):
    """A run, whole."""

    run: RunConfig = RunConfig()
    """Identity of the run."""
    data: DataConfig = DataConfig()
    """Images."""
    views: ViewsConfig = ViewsConfig()
    """Augmentation."""
    model: ModelConfig = ModelConfig()
    """Encoder and projector."""
    loss: LossConfig = LossConfig()
    """NT-Xent."""
    optim: OptimConfig = OptimConfig()
    """Optimizer."""
    train: TrainConfig = TrainConfig()
    """Training."""
    cluster: ClusterConfig = ClusterConfig()
    """Ray resources."""
    storage: StorageConfig = StorageConfig()
    """Object stores."""
    distill: DistillConfig = DistillConfig()
    """Learning from a teacher."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Probes."""
