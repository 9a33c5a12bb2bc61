"""A pack that is killed and run again ends with the same bytes as one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from simclr_ray import storage
from simclr_ray.data import index as index_module
from simclr_ray.data import pack as pack_module
from simclr_ray.data import work
from simclr_ray.data.index import IndexOptions, index
from simclr_ray.data.pack import pack
from simclr_ray.errors import ConfigError
from tests.conftest import ROOT, all_rows, make_data_set
from tests.integration import sources

pytestmark = pytest.mark.integration

UNIT = 4
SETTINGS = {"labels": "stored", "seed": 3, "unit_rows": UNIT, "shard_bytes": 2_500, "deduplicate": "exact"}


class Killed(BaseException):
    """Stands for the end of the process."""


def files(folder: Path) -> dict[str, bytes]:
    """What a pack leaves; the manifest says where it lies, so both are compared in the same place."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars, with duplicates and a file that is no image."""
    folder = tmp_path_factory.mktemp("killed") / "tars"
    images = sources.rows(60)
    sources.tars(folder, [*images, *images[:6]], each=25)
    sources.write_tar(folder / "00009.tar", [("page.jpg", b"<!doctype html>")])
    return folder


def test_killed_between_any_two_writes_of_the_driver(
    local_ray: None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enumerated, not sampled. Tasks write too: they are whatever far each kill lets them be."""
    monkeypatch.setattr(index_module, "SHARDS_A_TASK", 2)
    destination = tmp_path / "new"
    pack(str(source), str(destination), **SETTINGS)
    undisturbed = files(destination)
    assert {name.partition("-")[0] for name in undisturbed} == {
        "manifest.parquet", "duplicates.parquet", "rejected.parquet", "shard",
    }  # fmt: skip
    write = storage.write_bytes
    for allowed in range(100):
        storage.delete_folder(str(destination))
        left = allowed

        def counting(uri: str, data: bytes) -> str | None:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return write(uri, data)

        monkeypatch.setattr(storage, "write_bytes", counting)
        try:
            pack(str(source), str(destination), **SETTINGS)
        except Killed:
            killed = True
        else:
            killed = False
        monkeypatch.setattr(storage, "write_bytes", write)
        if not killed:
            break
        report = pack(str(source), str(destination), **SETTINGS)
        assert report.manifest.rows + report.duplicates + report.num_rejected == 67
        assert files(destination) == undisturbed, f"killed before write {allowed}"
    assert allowed >= 6, "settings, listing, index with report and manifest, lists of what is left out, manifest"


def test_killed_while_it_removes_its_work(
    local_ray: None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = tmp_path / "new"
    undisturbed = pack(str(source), str(destination), **SETTINGS)
    before = files(destination)
    storage.delete_folder(str(destination))

    def killed(uri: str) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(storage, "delete_folder", killed)
        with pytest.raises(Killed):
            pack(str(source), str(destination), **SETTINGS)
    assert pack(str(source), str(destination), **SETTINGS) == undisturbed
    assert files(destination) == before
    with pytest.raises(ConfigError, match="a packed data set is here already"):
        pack(str(source), str(destination), **SETTINGS)


def killed_when(moment: Callable[[], bool], command: list[str], environment: Mapping[str, str]) -> bool:
    """Kill a program and all it started at a moment; whether it was still running then."""
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < deadline and not moment():
        time.sleep(0.002)
    running = process.poll() is None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    return running


def test_a_process_that_is_killed_leaves_no_duplicate_and_no_hole(
    local_ray: None, source: Path, tmp_path: Path
) -> None:
    """SIGKILL of a whole process group, Ray and all, as soon as some of its shards are written."""
    destination = tmp_path / "new"
    script = textwrap.dedent(
        f"""
        import time

        import ray
        from simclr_ray.data import pack as module

        pack_one = module.pack_one

        def slowly(number, ranges, dropped, rewrite):
            time.sleep(0.5)  # the images are tiny: it would be done before anybody looks
            return pack_one(number, ranges, dropped, rewrite)

        module.pack_one = slowly
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
        module.pack({str(source)!r}, {str(destination)!r}, **{SETTINGS!r})
        """
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)  # of the Ray of this process
    notes = destination / work.PARTS
    assert killed_when(lambda: len(list(notes.glob("shard-*.json"))) >= 2, [sys.executable, "-c", script], environment)
    written = {path.name for path in notes.glob("shard-*.json")}
    assert len(written) >= 2
    assert not (destination / "manifest.parquet").exists(), "it was not in the middle"
    report = pack(str(source), str(destination), **SETTINGS)
    assert report.manifest.rows + report.duplicates + report.num_rejected == 67
    assert len(report.manifest.shards) > len(written)
    disturbed = files(destination)
    storage.delete_folder(str(destination))
    assert pack(str(source), str(destination), **SETTINGS) == report
    assert files(destination) == disturbed


def test_other_settings_are_refused_once_shards_are_written(local_ray: None, source: Path, tmp_path: Path) -> None:
    with killed_at("_committed"):
        pack(str(source), str(tmp_path / "new"), **SETTINGS)
    with pytest.raises(ConfigError, match="another seed") as caught:
        pack(str(source), str(tmp_path / "new"), **(SETTINGS | {"seed": 4}))
    assert "expected 3" in str(caught.value)
    assert pack(str(source), str(tmp_path / "new"), **SETTINGS).manifest.rows == 60


def test_an_index_goes_on_with_what_was_opened(
    local_ray: None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "SHARDS_A_TASK", 1)
    undisturbed = index(str(source), str(tmp_path / "one"), IndexOptions(unit_rows=UNIT))

    def killed(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(index_module, "write_manifest", killed)
        with pytest.raises(Killed):
            index(str(source), str(tmp_path / "two"), IndexOptions(unit_rows=UNIT))
    opened = tmp_path / "two" / work.OPENED
    times = {path.name: path.stat().st_mtime_ns for path in opened.iterdir()}
    assert len(times) == 4
    next(iter(sorted(opened.iterdir()))).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "finish", lambda folder: None)
        again = index(str(source), str(tmp_path / "two"), IndexOptions(unit_rows=UNIT))
    assert again.manifest.fingerprint == undisturbed.manifest.fingerprint
    kept = {path.name for path in opened.iterdir() if path.stat().st_mtime_ns == times[path.name]}
    assert len(kept) == 3


# --- a source that changes in between -------------------------------------------------------------------------------


@contextmanager
def killed_at(name: str, module: object = pack_module) -> Iterator[None]:
    """The process ends where it would call a function."""

    def killed(*arguments: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, killed)
        try:
            yield
        except Killed:
            return
    raise AssertionError(f"{name} was not called")


@pytest.fixture
def listed(tmp_path: Path) -> Callable[[slice], Path]:
    """Writes a list of some of 40 loose images."""
    sources.loose(tmp_path / "loose", sources.rows(40))
    images = sorted((tmp_path / "loose").rglob("*.png"))

    def write(chosen: slice) -> Path:
        (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in images[chosen]))
        return tmp_path / "list.txt"

    return write


def test_a_list_that_changed_is_refused_once_shards_are_written(
    local_ray: None, listed: Callable[[slice], Path], tmp_path: Path
) -> None:
    options = {"unit_rows": UNIT, "shard_bytes": 2_500}
    with killed_at("_committed"):
        pack(str(listed(slice(30))), str(tmp_path / "new"), **options)
    before = files(tmp_path / "new")
    listed(slice(5, 40))
    with pytest.raises(ConfigError, match="the source changed since the work in this folder was begun") as caught:
        pack(str(tmp_path / "list.txt"), str(tmp_path / "new"), **options)
    assert "delete the folder" in str(caught.value)
    assert files(tmp_path / "new") == before
    listed(slice(30))
    rows = all_rows(pack(str(tmp_path / "list.txt"), str(tmp_path / "new"), **options).manifest)
    assert len(rows) == len({row["uri"] for row in rows}) == 30


def test_a_data_set_that_changed_is_refused_once_shards_are_written(local_ray: None, tmp_path: Path) -> None:
    options = {"unit_rows": UNIT, "shard_bytes": 2_500}
    make_data_set(tmp_path / "set", sources.rows(40), unit_rows=UNIT)
    with killed_at("_committed"):
        pack(str(tmp_path / "set"), str(tmp_path / "new"), **options)
    storage.delete_folder(str(tmp_path / "set"))
    make_data_set(tmp_path / "set", sources.rows(60)[::-1], unit_rows=UNIT)
    with pytest.raises(ConfigError, match="the source changed"):
        pack(str(tmp_path / "set"), str(tmp_path / "new"), **options)


def test_before_any_shard_a_list_that_changed_begins_anew(
    local_ray: None, listed: Callable[[slice], Path], tmp_path: Path
) -> None:
    """Its index and the hashes of its images, which go by their number in the list, are thrown away."""
    options = {"unit_rows": UNIT, "shard_bytes": 2_500, "deduplicate": "exact"}
    with killed_at("_written"):
        pack(str(listed(slice(30))), str(tmp_path / "new"), **options)
    assert list((tmp_path / "new" / work.HASHES).iterdir())
    report = pack(str(listed(slice(None, None, 2))), str(tmp_path / "new"), **options)
    disturbed = files(tmp_path / "new")
    storage.delete_folder(str(tmp_path / "new"))
    assert pack(str(tmp_path / "list.txt"), str(tmp_path / "new"), **options) == report
    assert files(tmp_path / "new") == disturbed


def test_an_index_of_a_list_of_tars_that_changed_begins_anew(
    local_ray: None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Notes of opened tars go by their number in the list."""
    monkeypatch.setattr(index_module, "SHARDS_A_TASK", 1)
    tars = sorted(source.glob("*.tar"))
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in tars[:2]))
    with killed_at("write_manifest", index_module):
        index(str(tmp_path / "list.txt"), str(tmp_path / "new"), IndexOptions(unit_rows=UNIT))
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in tars[1:3]))
    manifest = index(str(tmp_path / "list.txt"), str(tmp_path / "new"), IndexOptions(unit_rows=UNIT)).manifest
    assert [manifest.shard_uri(shard) for shard in range(2)] == [str(path) for path in tars[1:3]]
