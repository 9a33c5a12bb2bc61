"""What is searched, over what, and what a good trial is: one YAML file, checked whole before Ray starts.

The values a space may take are tried on the schema of the configuration by building the `Config` of each end and each
choice, so a space that could propose a mistake is refused, with all its mistakes at once. Nothing here knows Ray.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import ValidationError, model_validator

from simclr_ray.config import Config, Count, Section
from simclr_ray.configure import all_keys, describe, listing, load_config, read_mapping, suggestion
from simclr_ray.data.manifest import Manifest
from simclr_ray.errors import SimclrError
from simclr_ray.train.derive import derive
from simclr_ray.train.run import FREE

Whole = int  # the name is a field's below
Scalar = bool | int | float | str | None
Settings = Mapping[str, Any]
"""Values of a trial, by the full path of their key."""
MOST_TRIED = 128
"""Values of a range of whole numbers that are tried, about, in odd steps: "a multiple of 64" holds for few of them."""
Kind = Literal["uniform", "loguniform", "quniform", "int", "logint", "choice", "grid"]

MEASURES = ("knn_top1", "linear_top1", "rankme", "lidar", "alignment", "uniformity", "alignment_uniformity")
MeasureName = Literal["knn_top1", "linear_top1", "rankme", "lidar", "alignment", "uniformity", "alignment_uniformity"]
LABELLED = ("knn_top1", "linear_top1")
LOSS_REASON = (
    "the contrastive loss and what is made of it cannot rank trials: its value depends on the temperature, on the "
    "number of negatives (the batch) and on how hard the views are, so the best loss is that of the easiest task"
)

_REASONS = {
    "run.": "it names a run, and a seed is no setting to choose: finalists are repeated over seeds instead",
    "data.": "trials that see other images cannot be compared",
    "storage.": "it does not change what is learned",
    "cluster.": "it does not change what is learned",
    "evaluate.": "it changes the yardstick, not the encoder",
    "train.steps": "trials of other length cannot be compared; the run's length is the budget of each trial",
    "train.epochs": "trials of other length cannot be compared; the run's length is the budget of each trial",
}
PERTURBABLE = (
    "loss.temperature",
    "views.strength",
    "views.crop_scale_min",
    "views.flip_probability",
    "views.jitter_probability",
    "views.grayscale_probability",
    "views.blur_probability",
    "views.solarize_probability",
    "optim.base_learning_rate",
    "optim.weight_decay",
)
"""What population-based training may change in the middle of a run: the checkpoint of another value fits."""


class Distribution(Section):
    """Values of one key; exactly one of these is given."""

    uniform: tuple[float, float] | None = None
    """Any number from a to b, all equally likely."""
    loguniform: tuple[Annotated[float, Gt(0)], Annotated[float, Gt(0)]] | None = None
    """Any number from a to b, its logarithm uniform."""
    quniform: tuple[float, float, Annotated[float, Gt(0)]] | None = None
    """Multiples of q from a to b: `[a, b, q]`."""
    int: tuple[Whole, Whole] | None = None
    """Whole numbers from a to b, both included."""
    logint: tuple[Annotated[Whole, Ge(1)], Annotated[Whole, Ge(1)]] | None = None
    """Whole numbers from a to b, both included, their logarithm uniform."""
    choice: Annotated[tuple[Scalar, ...], MinLen(2)] | None = None
    """One of these."""
    grid: Annotated[tuple[Scalar, ...], MinLen(2)] | None = None
    """All of these, in every combination with the other grids."""

    @model_validator(mode="after")
    def _one_and_ascending(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(type(self).model_fields)}; here are {len(given)}")
        if self.kind not in ("choice", "grid") and not self.values[0] < self.values[1]:
            raise ValueError(f"{self.kind} needs its first number to be the smaller one")
        if self.quniform and any(abs(end / self.quniform[2] - round(end / self.quniform[2])) > 1e-9
                                 for end in self.quniform[:2]):  # fmt: skip
            raise ValueError(f"quniform needs ends that are multiples of its step, {self.quniform[2]:g}")
        return self

    @property
    def kind(self) -> Kind:
        """Which one it is."""
        return next(name for name in get_args(Kind) if getattr(self, name) is not None)

    @property
    def values(self) -> tuple[Any, ...]:
        """As given."""
        return tuple(getattr(self, self.kind))

    def to_try(self) -> tuple[Any, ...]:
        """Values that must be valid: all of a list, ends and inner ones of a range."""
        if self.kind in ("choice", "grid"):
            return self.values
        low, high = self.values[:2]
        if self.kind in ("int", "logint"):
            return (*range(low, high, (high - low) // MOST_TRIED | 1), high)
        if self.quniform:
            step, many = self.quniform[2], round((high - low) / self.quniform[2])
            return (*(low + step * i for i in range(0, many, many // MOST_TRIED | 1)), high)
        return low, high, low + (high - low) / math.pi  # where only whole numbers will do, this one is refused

    def clamped(self, value: Any) -> Any:
        """The nearest value inside."""
        if self.kind in ("choice", "grid"):
            return value if value in self.values else self.values[0]
        inside = min(max(value, self.values[0]), self.values[1])
        return round(inside) if self.kind in ("int", "logint") else inside


class ObjectiveSpec(Section):
    """How a checkpoint is measured; always on the same images and views, whatever the trial trains on."""

    measure: MeasureName | Literal["auto"] = "auto"
    """What ranks trials; all that can be are measured and kept. auto: knn_top1 where the images have labels and a
    labelled set is named, else rankme."""
    also: MeasureName | None = None
    """A second objective, for searcher tpe: values are proposed for both at once, and trials that no other beats in
    both are marked. Schedulers, finalists and the winner go by `measure` alone."""
    every: Count
    """Optimizer steps of the given configuration between two scores of a trial."""
    data: str | None = None
    """Data set of the images; null takes evaluate.train, or else data.train. Never evaluate.test: what is chosen by a
    set says nothing more about it."""
    images: Annotated[int, Ge(16), Le(100_000)] = 1024
    """Images that are measured."""
    voters: Annotated[int, Ge(16), Le(1_000_000)] = 4096
    """Further labelled images, which vote (kNN) and train the probe."""
    views: Annotated[int, Ge(2), Le(64)] = 4
    """Views of each image; LiDAR takes all, alignment the first two."""
    cpus: Annotated[float, Ge(0)] = 0.0
    """CPUs that one measurement asks Ray for. With 0 it runs at once, beside what runs there: where streams keep the
    last CPU busy it would else wait until trials are trained to their end, and none could be ended early."""
    gpus: Annotated[float, Ge(0), Le(1)] = 0.0
    """Part of a GPU that it asks for."""


class SearchSpec(Section):
    """A search, whole."""

    space: Annotated[dict[str, Distribution], MinLen(1)]
    """Keys of the configuration, such as loss.temperature, and their values."""
    objective: ObjectiveSpec
    """What a good trial is."""
    searcher: Literal["random", "grid", "tpe"] = "random"
    """Who proposes values: `random`; `grid`, all combinations; `tpe`, Optuna's tree of Parzen estimators."""
    scheduler: Literal["none", "asha", "median", "pbt"] = "none"
    """Who ends or changes trials under way: `asha`, successive halving; `median`, below the others' median; `pbt`, bad
    trials go on from good ones' checkpoints with values changed a little."""
    trials: Count | None = None
    """How many to propose; a grid has as many as it has combinations."""
    seed: Annotated[int, Ge(0), Lt(2**32)] = 0
    """Of the proposals."""
    max_concurrent: Count | None = None
    """Trials side by side; null: as many as the cluster has room for. Where an autoscaler adds nodes, say how many."""
    grace: Count = 1
    """Scores that a trial may have before it can be ended."""
    reduction: Annotated[float, Gt(1)] = 3.0
    """Of ASHA: one in so many goes on from each rung to the next, which is so many times longer."""
    perturb_every: Count = 1
    """Of PBT: scores between two decisions."""
    quantile: Annotated[float, Gt(0), Le(0.5)] = 0.25
    """Of PBT: the worst such part of the trials goes on from the best such part."""
    stall_s: Annotated[float, Gt(0)] = 3600.0
    """A trial whose workers bring no new score for so many seconds is given up; waiting for nodes does not count."""
    finalists: Annotated[int, Ge(0)] = 3
    """Best trials that are trained again, beside the given configuration, each once a seed; 0: none."""
    seeds: Count = 3
    """Seeds of each finalist, all others than the search's."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        grids = [key for key, values in self.space.items() if values.kind == "grid"]
        if self.searcher == "grid" and len(grids) < len(self.space):
            raise ValueError("searcher grid needs the kind grid for every key of the space")
        if self.searcher != "grid" and grids:
            raise ValueError(f"searcher {self.searcher} proposes values; use choice instead of grid ({grids[0]})")
        if self.searcher == "grid" and self.trials is not None:
            raise ValueError("a grid has as many trials as it has combinations; leave trials out")
        if self.searcher != "grid" and self.trials is None:
            raise ValueError(f"searcher {self.searcher} needs a number of trials")
        if self.scheduler == "pbt" and (fixed := [key for key in self.space if key not in PERTURBABLE]):
            raise ValueError(
                f"scheduler pbt changes values in the middle of a run, which {', '.join(fixed)} cannot be; "
                f"it can change {', '.join(PERTURBABLE)}"
            )
        if self.objective.also is not None and self.searcher != "tpe":
            raise ValueError(f"objective.also is a second objective for searcher tpe, not for {self.searcher}")
        if self.objective.also is not None and self.objective.also == self.objective.measure:
            raise ValueError(f"objective.also and objective.measure are both {self.objective.also}; give another one")
        if self.scheduler == "pbt" and self.searcher == "tpe":
            raise ValueError("scheduler pbt proposes values itself; use searcher random or grid")
        return self

    @property
    def keep(self) -> int:
        """Measured checkpoints of a trial to keep: PBT takes one of up to so many scores ago."""
        return 2 * self.perturb_every + 1

    @property
    def num_trials(self) -> int:
        """How many there will be."""
        if self.trials is not None:
            return self.trials
        combinations = 1
        for values in self.space.values():
            combinations *= len(values.values)
        return combinations


FREE_FIELDS = ("max_concurrent", "stall_s", "objective.cpus", "objective.gpus")
"""Fields that may change when a search is continued."""


def load_space(source: SearchSpec | Mapping[str, Any] | str | Path) -> SearchSpec:
    """Read a space; its keys are not yet compared with a configuration.

    Raises:
        ConfigError: listing every mistake, one a line.
    """
    if isinstance(source, SearchSpec):
        return source
    values = read_mapping(source)
    problems = _loss_named(values)
    try:
        spec = SearchSpec.model_validate(values)
    except ValidationError as error:
        every = error.errors(include_url=False)
        refused = [("objective", problem.split(":")[0].removeprefix("objective.")) for problem in problems]
        measure = [one for one in every if one["loc"][:2] == ("objective", "measure")]
        others = [one for one in every if one not in measure]
        problems += [
            describe(one, all_keys(SearchSpec)) for one in (*others, *_merged(measure)) if one["loc"][:2] not in refused
        ]
    if problems:
        raise listing(problems, "the space")
    return spec


def check_space(spec: SearchSpec, config: Config, manifest: Manifest) -> None:
    """Try a space on a configuration and its data set.

    Raises:
        ConfigError: listing every key that cannot be searched and every value that cannot be.
    """
    problems: list[str] = []
    known = set(all_keys())
    for key, values in spec.space.items():
        if key not in known:
            problems.append(f"{key}: unknown key{suggestion(key)}")
        elif (reason := why_not(key)) is not None:
            problems.append(f"{key}: cannot be searched: {reason}")
        else:
            problems += _refused(key, values, config, manifest)
    if "train.global_batch" in spec.space and config.train.steps is not None:
        problems.append(
            "train.global_batch: trials of so many steps would see different numbers of images; give the length as "
            "train.epochs"
        )
    for name in ("measure", "also"):
        measure = getattr(spec.objective, name)
        if measure in LABELLED and not labelled_named(spec, config):
            problems.append(
                f"objective.{name}: {measure} needs labels; name a labelled set in evaluate.train or objective.data, "
                "or use rankme, lidar or alignment_uniformity"
            )
    if problems:
        raise listing(problems, "the space")


def why_not(key: str) -> str | None:
    """Why a key of the configuration cannot be searched; None where it can."""
    if "." not in key:
        return "it is a section; name a key of it"
    for prefix, reason in _REASONS.items():
        if key.startswith(prefix):
            return reason
    if key.startswith(FREE):
        return "it decides speed or logging, not what is learned"
    return None


def labelled_named(spec: SearchSpec, config: Config) -> bool:
    """Whether the configuration says where labels are."""
    return bool(spec.objective.data or config.evaluate.train or config.evaluate.test)


def with_settings(config: Config, settings: Settings) -> Config:
    """The configuration with values by full path on top, validated like any other.

    Raises:
        ConfigError: listing every mistake.
    """
    return load_config(config, [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def _refused(key: str, values: Distribution, config: Config, manifest: Manifest) -> Iterator[str]:
    """A sentence for each value that cannot be; one for many of a range."""
    found = list(_mistakes(key, values.to_try(), config, manifest))
    if values.kind in ("int", "logint", "quniform") and len(found) > 1:
        found = [f"{found[0]} (as {len(found)} of {len(values.to_try())} tried; list those that can be, as choice)"]
    yield from dict.fromkeys(found)


def _mistakes(key: str, values: Sequence[Any], config: Config, manifest: Manifest) -> Iterator[str]:
    for value in values:
        try:
            derive(with_settings(config, {key: value}), manifest)
        except SimclrError as error:
            _, _, lines = error.what.partition(":\n")
            text = "; ".join(line.strip() for line in lines.splitlines()) if lines else str(error).replace("\n ", ";")
            yield text if text.startswith(key) else f"{key}={value!r}: {text}"


def _loss_named(values: Mapping[str, Any]) -> list[str]:
    objective = values.get("objective")
    named = {key: objective.get(key) for key in ("measure", "also")} if isinstance(objective, Mapping) else {}
    return [
        f"objective.{key}: {measure!r} is refused: {LOSS_REASON}; use one of {', '.join(MEASURES)}"
        for key, measure in named.items()
        if isinstance(measure, str) and ("loss" in measure or "contrastive" in measure)
    ]


def _merged(errors: Sequence[Any]) -> list[Any]:
    """One line for a measure that neither part of its union takes."""
    if not errors:
        return []
    wanted = "one of " + ", ".join(("auto", *MEASURES))
    return [{"type": "literal_error", "loc": ("objective", "measure"), "input": errors[0]["input"], "msg": wanted}]
