"""`simclr-ray submit` and `simclr-ray jobs`, for the command line."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Callable
from typing import Any

from simclr_ray.observe.console import Console, duration
from simclr_ray.submit.follow import INTERRUPTED
from simclr_ray.submit.order import STOP_WAIT_S, VERBS

MakeVerb = Callable[..., argparse.ArgumentParser]


def add_commands(verbs: Any, make_verb: MakeVerb) -> None:
    """Add the verbs `submit` and `jobs`.

    Args:
        verbs: The command line's sub-parsers.
        make_verb: Of (verbs, name, call, help), as the other verbs are made.
    """
    verb = make_verb(verbs, "submit", _submit, "run a verb as a job of a running cluster, and follow it")
    verb.add_argument("verb", choices=tuple(VERBS), help="what to run there")
    verb.add_argument("target", metavar="CONFIG", help="YAML file; for verbs that take folders, the first of them")
    verb.add_argument("folders", nargs="*", metavar="FOLDER", help="the others")
    verb.add_argument("--flags", default="", help="of the verb, as one word, such as --flags='--labels folder'")
    verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    verb.add_argument("--fresh", action="store_true", help="as of pretrain: remove what an earlier run left there")
    verb.add_argument("--detach", action="store_true", help="print the job's id and leave it to itself")
    verb.add_argument("--id", help="name of the job (default: from verb and run folder)")
    verb.add_argument(
        "--environment", choices=("image", "source"), default="image",
        help="take the cluster's installation, or ship this package's source to it (default: %(default)s)",
    )  # fmt: skip
    verb.add_argument("--any-versions", action="store_true", help="run also where torch, Ray, ... have other versions")
    verb.add_argument(
        "--stop-wait-s", type=int, default=STOP_WAIT_S, metavar="S",
        help="seconds for a last checkpoint when the job is stopped (default: %(default)s)",
    )  # fmt: skip
    verb.add_argument(
        "--allow-unauthenticated", action="store_true", help="send it to a cluster that asks nobody for a token"
    )
    _address(verb)

    group = verbs.add_parser("jobs", help="look at jobs of a cluster, and stop them").add_subparsers(
        required=True, metavar="ACTION"
    )
    for name, call, text in (
        ("status", _status, "where a job stands"),
        ("logs", _logs, "what a job has printed"),
        ("stop", _stop, "have a job save a last checkpoint and end"),
    ):
        action = make_verb(group, name, call, text)
        action.add_argument("id")
        _address(action)
        if name == "logs":
            action.add_argument("--follow", action="store_true", help="and what it prints until it ends")
        if name == "stop":
            action.add_argument("--no-wait", action="store_true", help="do not wait for its end")
    _address(make_verb(group, "ls", _list, "all jobs that were submitted, the newest first"))


def _address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", help="of the dashboard, http://HOST:8265 (default: RAY_API_SERVER_ADDRESS)")


def _submit(options: argparse.Namespace) -> int:
    from simclr_ray.submit import jobs

    console = Console()
    flags = shlex.split(options.flags) + ["--fresh"] * options.fresh
    job = jobs.submit(
        options.verb, options.target, options.set, address=options.address, folders=options.folders, options=flags,
        job=options.id, environment=options.environment,
        any_versions=options.any_versions, stop_wait_s=options.stop_wait_s,
        allow_unauthenticated=options.allow_unauthenticated, say=console.say,
    )  # fmt: skip
    console.say(f"job: {job}")
    return 0 if options.detach else _follow(job, options.address, console)


def _follow(job: str, address: str | None, console: Console) -> int:
    from simclr_ray.submit import jobs

    try:
        ended = jobs.follow(job, address=address, say=console.say)
    except KeyboardInterrupt:
        console.say(f"{job} goes on; follow it with: simclr-ray jobs logs --follow {job}, end it with: jobs stop")
        return INTERRUPTED
    console.say(ended.verdict)
    return ended.exit_code or 0


def _status(options: argparse.Namespace) -> None:
    from simclr_ray.submit import jobs

    found = jobs.status(options.id, address=options.address)
    Console().say(f"{found.status}  {found.verb} {found.run}  {duration(found.seconds)}")
    if found.verdict:
        Console().say(f"{found.verdict} (exit code {found.exit_code})")


def _logs(options: argparse.Namespace) -> int:
    from simclr_ray.submit import jobs

    if options.follow:
        return _follow(options.id, options.address, Console())
    Console().block(jobs.logs(options.id, address=options.address).rstrip("\n"))
    return 0


def _stop(options: argparse.Namespace) -> None:
    from simclr_ray.submit import jobs

    console = Console()
    if options.no_wait:
        console.say(f"{options.id}: {jobs.stop(options.id, address=options.address, wait_s=0).status}")
        return
    console.say(f"stopping {options.id}; it saves a last checkpoint first")
    console.say(jobs.stop(options.id, address=options.address).verdict)


def _list(options: argparse.Namespace) -> None:
    from simclr_ray.submit import jobs

    rows = [
        (one.id, one.status, one.verb, one.run, _when(one.started_s), duration(one.seconds))
        for one in jobs.jobs(address=options.address)
    ]
    Console().table(("job", "status", "verb", "run", "started", "for"), rows)


def _when(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else "-"
