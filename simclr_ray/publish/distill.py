"""The verb `distill`: a student learns what its teacher says of images, without labels or with a few (SimCLR v2).

It is a pretraining with another loss: the same stream, steps, checkpoints and resuming. Views are crops and flips alone
(arXiv 2006.10029, section 2), and the projector is a classifier of the teacher's classes. The teacher is a classifier
that `evaluate` trained on a few labels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

from simclr_ray import storage
from simclr_ray.config import Config
from simclr_ray.configure import ConfigSource, load_config, use_storage
from simclr_ray.data.manifest import read_manifest
from simclr_ray.errors import ConfigError
from simclr_ray.evaluate.online import online_evaluation
from simclr_ray.train.derive import policy_of
from simclr_ray.train.pretrain import RunResult, pretrain
from simclr_ray.train.run import RunFolder, open_existing

CROPS_AND_FLIPS = (
    "views.jitter_probability=0", "views.grayscale_probability=0", "views.blur_probability=0",
    "views.solarize_probability=0",
)  # fmt: skip


def distill(
    teacher: str, config: ConfigSource, overrides: Sequence[str] = (), *, classifier: str | None = None,
    temperature: float | None = None, labels: Literal["none", "teacher"] | None = None, fresh: bool = False,
) -> RunResult:  # fmt: skip
    """Train a student; run it again with the same `run.folder` and it continues where it stands.

    Args:
        teacher: Run folder of the teacher.
        config: Of the student, as for `pretrain`; colours and blur of its views are left out.
        overrides: On top of it.
        classifier: File in the teacher's run; None takes the only one there is.
        temperature: None takes the config's.
        labels: `teacher`: the student also sees the labels that the classifier was trained with; None takes the
            config's, which is none.
        fresh: Remove what an earlier run left in `run.folder`.

    Raises:
        ConfigError: the teacher has no classifier, or several; it is another one than when the student began; its
            labels are asked for and are of another data set; the student's folder is the teacher's; and all that
            `pretrain` raises.
    """
    from simclr_ray.train.teacher import labels_of_teacher, load_teacher

    _refuse_colours(overrides)
    chosen = [*overrides, *CROPS_AND_FLIPS]
    chosen += [f"distill.temperature={temperature}"] if temperature is not None else []
    chosen += [f"distill.labels={labels}"] if labels is not None else []
    settings = load_config(config, chosen)
    use_storage(settings)
    run, of_teacher = open_existing(teacher)
    begun = _begun(settings, run, fresh=fresh)
    _refuse_other_input(of_teacher, settings, run.uri)
    name = classifier or settings.distill.classifier or _only_classifier(run)
    values = settings.model_dump(mode="json")
    values["distill"] |= {"teacher": run.uri, "classifier": name, "digest": begun or settings.distill.digest}
    loaded = load_teacher(load_config(values).distill)
    if settings.distill.labels == "teacher":
        labels_of_teacher(loaded, read_manifest(str(settings.data.train)))  # which may refuse: before anything starts
    values["distill"]["digest"] = loaded.digest
    values["model"]["projection_dim"] = loaded.num_classes
    return pretrain(load_config(values), fresh=fresh, beside=online_evaluation)


def _begun(student: Config, teacher: RunFolder, *, fresh: bool) -> str | None:
    """Digest of the classifier that the student in `run.folder` began with; None where it begins now.

    Raises:
        ConfigError: no folder is given, or it is the teacher's.
    """
    if student.run.folder is None:
        raise ConfigError("the student needs a folder", where="run.folder", fix="add --set run.folder=FOLDER")
    folder = RunFolder(storage.normalise(student.run.folder))
    if _real(folder.uri) == _real(teacher.uri):
        raise ConfigError("the student's folder is its teacher's", where=folder.uri,
                          fix="give the student one of its own: --set run.folder=FOLDER")  # fmt: skip
    info = None if fresh else folder.info()
    digest = (info or {}).get("identity", {}).get("distill.digest")
    return None if digest is None else str(digest)


def _real(uri: str) -> str:
    """A local folder by its own name, whatever links and dots lead to it."""
    return os.path.realpath(uri) if storage.is_local(uri) else uri


def _refuse_colours(overrides: Sequence[str]) -> None:
    """Refuse what is going to be overridden.

    Raises:
        ConfigError: with the setting.
    """
    for text in overrides:
        key, _, value = (part.strip() for part in text.partition("="))
        if f"{key}=0" in CROPS_AND_FLIPS and value != "null" and value.strip("0.") != "":
            raise ConfigError("a student sees crops and flips alone", where=key, got=value, expected="0, or nothing",
                              fix="leave the setting out")  # fmt: skip


def _refuse_other_input(teacher: Config, student: Config, where: str) -> None:
    """Both see the same views, so both must have learned to see them so.

    Raises:
        ConfigError: with what differs.
    """
    theirs, ours = policy_of(teacher.views), policy_of(student.views)
    for name in ("size", "mean", "std", "flavour"):
        a, b = getattr(theirs, name), getattr(ours, name)
        if a != b:
            raise ConfigError(
                f"teacher and student do not see images alike: they differ in {name}", where=where,
                got=f"{b} of the student", expected=f"{a}, as the teacher was trained",
                fix="give the student the teacher's views.preset, views.flavour and views.size",
            )  # fmt: skip


def _only_classifier(run: RunFolder) -> str:
    from simclr_ray.train.teacher import classifiers_of

    found = classifiers_of(run)
    if len(found) == 1:
        return found[0]
    raise ConfigError(
        "the teacher has several classifiers" if found else "the teacher has no classifier yet", where=run.uri,
        got=", ".join(found) or None,
        fix="choose one with --classifier" if found
        else "make one with: simclr-ray evaluate TEACHER --set evaluate.protocols=[finetune]",
    )  # fmt: skip
