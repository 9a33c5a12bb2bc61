"""The verb `tune`: check all, let Ray Tune propose and end trials, train the best again, leave results.

```
search.json      the space and the configuration it belongs to, status
trials/ID/       trial.json and a run folder for each life, gen-1, gen-2, ...
finalists/NAME/  the same, of repetitions; finalists.json says of what
best.yaml        trials.parquet     search.html
tune/            Ray Tune's own state
```

Running it again with the same folder continues it; a search that is done is not repeated.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import tune as ray_tune

from simclr_ray import storage
from simclr_ray.config import Config
from simclr_ray.configure import ConfigSource, flat, load_config, use_storage
from simclr_ray.data.manifest import Manifest, read_manifest
from simclr_ray.errors import ClusterError, ConfigError, root_cause
from simclr_ray.observe.console import Console
from simclr_ray.search import finalists as final
from simclr_ray.search import results
from simclr_ray.search.folder import FORMAT, Identity, SearchFolder, look
from simclr_ray.search.page import Page, write_page
from simclr_ray.search.preflight import require_dashboard, require_state_api
from simclr_ray.search.probe import ProbeSet, read_probe
from simclr_ray.search.progress import Progress, Told, listening
from simclr_ray.search.propose import Variants, domains, limited, scheduler, searcher, side_by_side
from simclr_ray.search.record import ScoresBefore, TrialRecord, read_records
from simclr_ray.search.room import make_room
from simclr_ray.search.space import LABELLED, SearchSpec, check_space, labelled_named, load_space
from simclr_ray.search.trial import MEMORY_BYTES, Rungs, Trial, TrialPlan
from simclr_ray.train.cluster import connected, prints_logged, refuse_other_versions, variables
from simclr_ray.train.derive import derive, limits_of, policy_of
from simclr_ray.train.keeper import graceful_stop
from simclr_ray.train.lock import hold

FINALISTS = "finalists.json"
TRIES = 1
"""Times that a trial whose process or workers were lost is begun again, beyond what its training does by itself."""


@dataclass(frozen=True)
class SearchResult:
    """What a search found."""

    folder: str
    best: Mapping[str, Any]
    """Values of the winner; empty where the given configuration was not beaten."""
    measure: str
    trials: tuple[TrialRecord, ...]
    finalists: tuple[final.Finalist, ...]


@dataclass(frozen=True)
class _Search:
    """What one start of a search was found to be."""

    at: SearchFolder
    config: Config
    spec: SearchSpec
    manifest: Manifest
    measured: Manifest
    """Of the images of the objective."""
    total_steps: int
    console: Console
    look_up: Callable[[], None] = lambda: None
    """Raises KeyboardInterrupt where a Ctrl-C got lost."""

    @property
    def folder(self) -> str:
        return self.at.uri

    @property
    def keys(self) -> list[str]:
        return list(self.spec.space)


def tune(
    config: ConfigSource, space: SearchSpec | Mapping[str, Any] | str | Path, folder: str,
    overrides: Sequence[str] = (),
) -> SearchResult:  # fmt: skip
    """Search settings; run it again with the same folder and it continues where it stands.

    Args:
        config: A YAML file, a mapping, or a `Config`: what all trials have in common.
        space: A YAML file, a mapping, or a `SearchSpec`: what is searched, and how.
        folder: Folder of the search, local or an object store's.
        overrides: Such as `["train.epochs=10"]`, applied on top of `config`.

    Raises:
        ConfigError: a setting or the space cannot work, or the folder holds another search (before Ray starts).
        DataError: a data set is missing or broken, or has no labels where they are needed.
        ClusterError: no trial fits the cluster, the State API does not answer, or every trial failed.
        KeyboardInterrupt: it was stopped.
    """
    settings = load_config(config, overrides)
    spec = load_space(space)
    use_storage(settings)
    if not settings.data.train:
        raise ConfigError("data.train must be set", fix="add --set data.train=FOLDER")
    manifest = read_manifest(storage.normalise(str(settings.data.train)))
    check_space(spec, settings, manifest)
    at = SearchFolder(storage.normalise(folder))
    source = spec.objective.data or settings.evaluate.train or settings.data.train
    measured = read_manifest(storage.normalise(str(source)))
    search = _Search(at, settings, spec, manifest, measured, derive(settings, manifest).total_steps, Console())
    mine = Identity.of(settings, manifest, spec, measured)
    look(at, mine)
    require_dashboard(settings.cluster)
    with hold(search.folder, search.console.say), _never_lost() as look_up:
        return _tune(replace(search, look_up=look_up), mine)


def _tune(search: _Search, mine: Identity) -> SearchResult:
    """With the folder held."""
    console, info = search.console, search.at.info()
    if info is None:
        search.at.update(format=FORMAT, status="new", config=mine.config, space=mine.space)
    elif info["status"] == "finished":
        console.say(f"{search.folder}: finished already; nothing to do")
        return _result(search, info["measure"], say=True)
    console.say(
        f"search: {search.folder}" + (" (continues)" if info else "") + f"; {search.spec.num_trials} trials of "
        f"{search.total_steps} steps by {search.spec.searcher}, scheduler {search.spec.scheduler}"
    )
    with (
        _tune_environment(),
        connected(search.config.cluster, runs=search.spec.max_concurrent or 1, state_api=True),
        prints_logged(),
    ):
        search.look_up()
        refuse_other_versions()
        require_state_api()
        return _run(search)


def _run(search: _Search) -> SearchResult:
    """With Ray."""
    console, spec, cluster = search.console, search.spec, search.config.cluster
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    count, why = side_by_side(spec, cluster, ray.cluster_resources(), may_grow=bool(address))
    console.say(f"side by side: {count} ({why})")
    probe, measure = _probe(search)
    search.at.update(status="running", measure=measure)
    trials = TrialPlan(
        search.at.path("trials"),
        search.config.model_copy(update={"cluster": cluster.model_copy(update={"address": address})}),
        spec.objective, measure, spec.stall_s, spec.keep, probe, make_room(count),
    )  # fmt: skip
    scores = len(Rungs.of(search.config, search.config, spec.objective.every, search.total_steps).steps)
    _fit(
        search, "search", trials, domains(spec), spec.num_trials, count,
        search_alg=searcher(spec), scheduler=scheduler(spec, scores, ScoresBefore(trials.folder, measure)),
        num_samples=spec.trials or 1,
    )  # fmt: skip
    records = read_records(search.at.path("trials"))
    given = flat(search.config.model_dump(mode="json"))
    chosen = final.choose(records, measure, spec.finalists, but={key: given[key] for key in search.keys})
    if not final.choose(records, measure, 1):
        search.at.update(status="failed")
        for line in results.failures(records):
            console.say(line)
        raise ClusterError(
            f"all {len(records)} trials failed", where=search.folder,
            got=results.failures(records)[0] if records else "no trial that began",
            fix="mend the cause; the same command tries again what failed for want of workers or storage, and in "
            "another --folder all is tried again",
        )  # fmt: skip
    if spec.finalists:
        _finals(search, trials, chosen, count)
    return _finish(search, measure)


def _finals(search: _Search, trials: TrialPlan, chosen: Sequence[TrialRecord], count: int) -> None:
    """Train the finalists; who they are is decided once."""
    try:
        listed = json.loads(storage.read_bytes(search.at.path(FINALISTS)))
    except FileNotFoundError:
        listed = [[one.name, dict(one.settings)] for one in chosen]
        storage.write_bytes(search.at.path(FINALISTS), json.dumps(listed, indent=1).encode())
    cases = final.cases([(name, values) for name, values in listed], search.spec, search.config.run.seed)
    plan = replace(trials, folder=search.at.path("finalists"), cases=cases)
    search.console.say(f"finalists: {len(listed)} and the configuration as given, {search.spec.seeds} seeds each")
    space = {"case": ray_tune.grid_search(list(range(len(cases))))}
    _fit(search, "finalists", plan, space, len(cases), count, search_alg=Variants())


def _probe(search: _Search) -> tuple[Any, str]:
    """A reference to the images of the search, read by a task, and the measure that they allow."""
    spec, config = search.spec.objective, search.config
    manifest = search.measured
    named = labelled_named(search.spec, config)
    read = ray.remote(num_cpus=1)(_read_probe)
    probe, labelled, count = read.options(num_returns=3).remote(manifest, config, search.spec, named)
    try:
        measured, has_labels = ray.get(count), ray.get(labelled)
    except ray.exceptions.RayError as error:
        raise root_cause(error) or error from None
    measure = spec.measure
    if measure == "auto":
        measure = "knn_top1" if has_labels else "rankme"
    for name, one in (("measure", measure), ("also", spec.also)):
        if one in LABELLED and not has_labels:
            raise ConfigError(
                f"{one} needs labels, which the data set has not", where=f"objective.{name}", got=manifest.folder,
                fix="name a labelled one in objective.data, or use rankme, lidar or alignment_uniformity",
            )  # fmt: skip
    if spec.also == measure:
        raise ConfigError(
            f"objective.measure is {measure} here, and objective.also is the same", where="objective.also",
            fix="name another measure",
        )  # fmt: skip
    both = results.named(measure) + (f" and {results.named(spec.also)}" if spec.also else "")
    seen = "" if spec.data or config.evaluate.train else ", which trials train on too, without labels"
    search.console.say(
        f"objective: {both} on {measured} images of {manifest.folder}{seen}, a score each {spec.every} steps"
    )
    return probe, measure


def _read_probe(manifest: Manifest, config: Config, spec: SearchSpec, with_labels: bool) -> tuple[ProbeSet, bool, int]:
    found = read_probe(
        manifest, policy_of(config.views), limits_of(config.data), images=spec.objective.images,
        voters=spec.objective.voters if with_labels else 0, views=spec.objective.views, seed=spec.seed,
    )  # fmt: skip
    return found, found.labels is not None, len(found.images)


def _fit(
    search: _Search, name: str, plan: TrialPlan, space: Mapping[str, Any], trials: int, count: int, **how: Any
) -> None:
    """Run Ray Tune, or continue it.

    Raises:
        KeyboardInterrupt: it was stopped.
    """
    trainable = ray_tune.with_resources(ray_tune.with_parameters(Trial, plan=plan), {"CPU": 0, "memory": MEMORY_BYTES})
    path = search.at.path("tune", name)
    if ray_tune.Tuner.can_restore(path):
        tuner = ray_tune.Tuner.restore(path, trainable, resume_unfinished=True, resume_errored=True)
    else:
        tuner = ray_tune.Tuner(
            trainable,
            param_space=dict(space),
            tune_config=ray_tune.TuneConfig(
                trial_dirname_creator=_dirname,
                **how,
            ),
            run_config=ray_tune.RunConfig(
                name=name,
                storage_path=search.at.path("tune"),
                verbose=0,
                callbacks=[Told()],
                failure_config=ray_tune.FailureConfig(max_failures=TRIES),
                checkpoint_config=ray_tune.CheckpointConfig(checkpoint_frequency=1, num_to_keep=plan.keep),
            ),
        )
    names = [case for case, _ in plan.cases]
    progress = Progress(search.console.say, plan.folder, plan.measure, trials, names, plan.room)
    stopped = _Stopped(search.console.say)
    search.look_up()
    with limited(count), listening(progress), graceful_stop(stopped), _interruptible():
        try:
            tuner.fit()
        except KeyboardInterrupt:
            stopped.asked = True
    if stopped.asked:
        search.at.update(status="interrupted")
        search.console.say("interrupted; run the same command again to continue the search")
        raise KeyboardInterrupt
    progress.settle()


class _Stopped:
    """Ends Ray Tune in a way that can be continued: by the signal that it always listens to."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.asked = False

    def __call__(self) -> None:
        self.asked = True
        self._say("stopping; once more to stop at once")
        os.kill(os.getpid(), signal.SIGUSR1)


@contextlib.contextmanager
def _never_lost() -> Iterator[Callable[[], None]]:
    """Ctrl-C as ever, and a function that raises it again: Python drops it where it falls into a destructor."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    pressed = False

    def interrupt(number: int, frame: Any) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    def look_up() -> None:
        if pressed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield look_up
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """What `_Stopped` sends ends the process, as long as Tune has not set its own way; here it is an interrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def _dirname(trial: Any) -> str:
    return str(trial.trial_id)


def _tune_environment() -> AbstractContextManager[None]:
    """Settings of Ray Tune that only its environment has."""
    return variables(
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",  # the truth is in trial.json
        TUNE_DISABLE_SIGINT_HANDLER="1",  # see `_Stopped`
        TUNE_GLOBAL_CHECKPOINT_S="1",  # a trial that Tune forgot by a kill would be trained for nothing
    )


def _finish(search: _Search, measure: str) -> SearchResult:
    result = _result(search, measure, say=True)
    results.write_table(search.folder, result.trials, search.keys)
    best = results.write_best(search.folder, search.config, result.best)
    page = write_page(
        search.folder,
        Page(search.config, search.spec, result.trials, result.finalists, result.best, measure, search.manifest),
    )
    search.at.update(status="finished")
    search.console.say(f"best configuration: {best} (simclr-ray pretrain takes it as it is)")
    search.console.say(f"page: {page}")
    return result


def _result(search: _Search, measure: str, *, say: bool) -> SearchResult:
    """What the records say, and on the console in tables."""
    console, keys = search.console, search.keys
    records = read_records(search.at.path("trials"))
    again = read_records(search.at.path("finalists"))
    found: list[final.Finalist] = []
    if again:
        listed = json.loads(storage.read_bytes(search.at.path(FINALISTS)))
        found = final.summarise([(name, values) for name, values in listed], again, measure)
    best = found[0].settings if found and found[0].values else final.choose(records, measure, 1)[0].settings
    if say:
        also = search.spec.objective.also
        console.table(*results.trial_rows(records, keys, measure, also))
        if len(records) > results.SHOWN:
            console.say(f"... and {len(records) - results.SHOWN} more, all in {search.at.path('trials.parquet')}")
        for line in (
            *results.front_lines(records, measure, also),
            *results.failures(records),
            *results.failures(again),
            *results.label_free_lines(records),
        ):
            console.say(line)
        if found:
            console.table(*results.finalist_rows(found, keys, measure))
            console.say(final.verdict(found))
    return SearchResult(search.folder, best, measure, tuple(records), tuple(found))
