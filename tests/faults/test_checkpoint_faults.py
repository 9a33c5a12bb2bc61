"""Faults of checkpoints: killed saves, damaged files, full disks, hostile content, other versions, retention."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simclr_ray import storage
from simclr_ray.errors import StorageError
from simclr_ray.train import checkpoint as ckpt
from tests.faults.kill_points import DONE, KILLED, state

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("keep", [1, 2])
def test_row_26_a_kill_at_every_operation_of_a_save_leaves_the_previous_checkpoint_or_the_new(
    tmp_path: Path, keep: int
) -> None:
    """Row 33 in the same enumeration: also with keep = 1 there is always a committed checkpoint."""
    program = [sys.executable, "-m", "tests.faults.kill_points", str(tmp_path), str(keep)]
    done = subprocess.run(program, cwd=ROOT, check=True, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["status"] for one in found] == [KILLED] * (len(found) - 1) + [DONE]
    assert len(found) > 20, "the enumeration saw too few operations to be true"
    for one in found:
        assert one["newest"] in (2, 3), one
        assert one["intact"], one
        assert one["committed"], one
        assert one["warnings"] == [], one
        assert one["folders_later"] == [ckpt.folder_name(step) for step in one["committed"] + [4]][-keep:], one
    assert [one["newest"] for one in found] == sorted(one["newest"] for one in found), "once committed, it stays"


def damaged(folder: str, how: str) -> str:
    """Two checkpoints, the newest of them damaged; returns what the warning must name."""
    for step in (1, 2):
        ckpt.save(folder, state(step))
    target = Path(folder, ckpt.folder_name(2))
    model, marker = target / "model.safetensors", target / ckpt.COMMIT_NAME
    match how:
        case "missing file":
            model.unlink()
            return "model.safetensors is missing"
        case "flipped byte":
            data = bytearray(model.read_bytes())
            data[-1] ^= 1
            model.write_bytes(data)
            return "model.safetensors is not what was committed"
        case "truncated":
            model.write_bytes(model.read_bytes()[:-4])
            return "were committed"
        case "marker alone":
            for name in ckpt.FILES:
                (target / name).unlink()
            return "is missing"
        case "marker cut":
            marker.write_bytes(marker.read_bytes()[:20])
            return "COMMIT.json is broken"
        case "marker of another step":
            other = Path(folder, ckpt.folder_name(1))
            for name in (*ckpt.FILES, ckpt.COMMIT_NAME):
                (target / name).write_bytes((other / name).read_bytes())
            return "holds step 1"
        case "huge marker":
            marker.write_bytes(b'{"files": "' + b"x" * 100_000 + b'"}')
            return "COMMIT.json has"
    raise AssertionError(how)


HOW = ("missing file", "flipped byte", "truncated", "marker alone", "marker cut", "marker of another step",
       "huge marker")  # fmt: skip


@pytest.mark.parametrize("how", HOW)
def test_row_27_a_damaged_newest_checkpoint_is_passed_over_by_name(tmp_path: Path, how: str) -> None:
    words = damaged(str(tmp_path), how)
    warnings: list[str] = []
    newest = ckpt.load_newest(str(tmp_path), warnings.append)
    assert newest is not None
    assert newest.step == 1
    assert len(warnings) == 1
    assert words in warnings[0]
    assert ckpt.folder_name(2) in warnings[0]


def test_row_27_an_empty_folder_is_no_checkpoint(tmp_path: Path) -> None:
    ckpt.save(str(tmp_path), state(1))
    Path(tmp_path, ckpt.folder_name(2)).mkdir()
    newest = ckpt.load_newest(str(tmp_path), pytest.fail)
    assert newest is not None
    assert newest.step == 1


def test_row_27_none_valid_is_an_error_and_never_a_start_from_scratch(tmp_path: Path) -> None:
    for step in (1, 2):
        ckpt.save(str(tmp_path), state(step))
        Path(tmp_path, ckpt.folder_name(step), "state.json").write_text("{}")
    with pytest.raises(StorageError, match="no checkpoint of this run is valid") as caught:
        ckpt.load_newest(str(tmp_path), lambda _: None)
    assert caught.value.exit_code == 4
    assert ckpt.folder_name(1) in str(caught.value)
    assert ckpt.folder_name(2) in str(caught.value)


def test_row_31_a_newer_format_is_refused_and_not_fallen_back_from(tmp_path: Path) -> None:
    for step in (1, 2):
        ckpt.save(str(tmp_path), state(step))
    marker = Path(tmp_path, ckpt.folder_name(2), ckpt.COMMIT_NAME)
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"format": ckpt.FORMAT + 1}))
    with pytest.raises(StorageError, match="newer version") as caught:
        ckpt.load_newest(str(tmp_path), pytest.fail)
    assert f"format {ckpt.FORMAT + 1}" in str(caught.value)
    assert f"at most {ckpt.FORMAT}" in str(caught.value)


class Probe:
    """Pickles into an order to make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def commit(folder: str, step: int, files: dict[str, bytes]) -> None:
    """A checkpoint of hostile files with a marker that vouches for them: the attacker can compute digests too."""
    target = Path(folder, ckpt.folder_name(step))
    target.mkdir(parents=True)
    for name, data in files.items():
        (target / name).write_bytes(data)
    vouched = {name: {"bytes": len(data), "digest": storage.digest(data)} for name, data in files.items()}
    (target / ckpt.COMMIT_NAME).write_text(json.dumps({"format": ckpt.FORMAT, "files": vouched}))


def test_row_32_a_pickle_in_place_of_tensors_is_refused_and_not_run(tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    torch.save({"w": Probe(probe)}, tmp_path / "model.pt")
    hostile = (tmp_path / "model.pt").read_bytes()
    state_json = json.dumps({"format": 1, "step": 5}).encode()
    commit(str(tmp_path / "run"), 5, {
        "model.safetensors": hostile, "optimizer.safetensors": hostile, "state.json": state_json,
    })  # fmt: skip
    with pytest.raises(StorageError, match="no checkpoint of this run is valid"):
        ckpt.load_newest(str(tmp_path / "run"), lambda _: None)
    assert not probe.exists()


def test_row_32_a_header_of_absurd_shapes_is_refused_without_memory(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}).encode()
    hostile = struct.pack("<Q", len(header)) + header
    longest = struct.pack("<Q", 2**62) + b"{}"
    state_json = json.dumps({"format": 1, "step": 5}).encode()
    for number, bad in enumerate((hostile, longest)):
        commit(str(tmp_path / str(number)), 5, {
            "model.safetensors": bad, "optimizer.safetensors": bad, "state.json": state_json,
        })  # fmt: skip
        with pytest.raises(StorageError, match="no checkpoint of this run is valid"):
            ckpt.load_newest(str(tmp_path / str(number)), lambda _: None)


@pytest.mark.parametrize("names", [["../../secret"], ["/etc/passwd", *ckpt.FILES]])
def test_row_32_a_marker_can_name_no_other_files(tmp_path: Path, names: list[str]) -> None:
    ckpt.save(str(tmp_path), state(1))
    marker = Path(tmp_path, ckpt.folder_name(1), ckpt.COMMIT_NAME)
    content = json.loads(marker.read_text())
    content["files"] = {name: content["files"].get(name, {"bytes": 1, "digest": "0"}) for name in names}
    marker.write_text(json.dumps(content))
    read: list[str] = []
    original = storage.read_bytes

    def noted(uri: str) -> bytes:
        read.append(os.path.normpath(uri))
        return original(uri)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "read_bytes", noted)
        try:
            ckpt.load_newest(str(tmp_path), lambda _: None)
        except StorageError:
            assert names == ["../../secret"]
    assert all(uri.startswith(str(tmp_path)) for uri in read)


def test_row_33_retention_counts_only_what_is_committed(tmp_path: Path) -> None:
    """A crash loop leaves halves of newer steps; they push no good checkpoint out, and go once a newer one is whole."""
    folder = str(tmp_path)
    for step in (1, 2, 3):
        ckpt.save(folder, state(step))
    for step in (4, 5, 6):
        half = tmp_path / ckpt.folder_name(step)
        half.mkdir()
        (half / "model.safetensors").write_bytes(b"half")
    ckpt.prune(folder, keep=1)
    assert ckpt.committed_steps(folder) == [3]
    ckpt.save(folder, state(7))
    ckpt.prune(folder, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [ckpt.folder_name(7)]
