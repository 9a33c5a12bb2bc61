"""A checkpoint exists or does not, and the newest valid one wins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simclr_ray import storage
from simclr_ray.errors import DataError, StorageError
from simclr_ray.learn.optim import make_optimizer, set_learning_rate
from simclr_ray.train import checkpoint as ckpt


def state(step: int) -> ckpt.Checkpoint:
    return ckpt.Checkpoint(step, {"w": torch.full((3, 2), float(step))}, {"0.m": torch.arange(4.0)}, {"manifest": "f"})


def test_a_saved_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    ckpt.save(str(tmp_path), state(7))
    loaded = ckpt.load(str(tmp_path), 7)
    assert loaded.step == 7
    assert loaded.facts == {"manifest": "f"}
    assert torch.equal(loaded.model["w"], state(7).model["w"])
    assert torch.equal(loaded.optimizer["0.m"], torch.arange(4.0))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("writes", range(5))
def test_a_kill_between_any_two_writes_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """Enumerated: three files and the marker make four writes; a kill before write n leaves step 1 the newest."""
    folder = str(tmp_path)
    ckpt.save(folder, state(1))
    done, write = [0], storage.write_bytes

    def counted(uri: str, data: bytes) -> None:
        if done[0] == writes:
            raise Killed
        done[0] += 1
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", counted)
    if writes < 4:
        with pytest.raises(Killed):
            ckpt.save(folder, state(2))
    else:
        ckpt.save(folder, state(2))
    monkeypatch.undo()
    newest = ckpt.load_newest(folder, warn=pytest.fail)
    assert newest is not None
    assert newest.step == (2 if writes >= 4 else 1)
    ckpt.save(folder, state(2))  # a second try over what the first left
    assert ckpt.load(folder, 2).step == 2


def break_marker(folder: Path) -> None:
    (folder / "COMMIT.json").write_text("{")


def flip_byte(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def truncate(folder: Path) -> None:
    (folder / "optimizer.safetensors").write_bytes((folder / "optimizer.safetensors").read_bytes()[:-3])


def remove(folder: Path) -> None:
    (folder / "state.json").unlink()


@pytest.mark.parametrize("damage", [break_marker, flip_byte, truncate, remove])
def test_a_damaged_newest_checkpoint_falls_back_one_and_says_why(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    for step in (1, 2):
        ckpt.save(str(tmp_path), state(step))
    damage(tmp_path / ckpt.folder_name(2))
    said: list[str] = []
    newest = ckpt.load_newest(str(tmp_path), said.append)
    assert newest is not None
    assert newest.step == 1
    assert len(said) == 1
    assert "step-000000002" in said[0]


def test_retention_never_counts_a_broken_checkpoint_among_the_newest(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        ckpt.save(str(tmp_path), state(step))
    for step in (200, 300):
        flip_byte(tmp_path / ckpt.folder_name(step))
    assert ckpt.load_newest(str(tmp_path), lambda text: None).step == 100  # type: ignore[union-attr]
    ckpt.save(str(tmp_path), state(150))
    ckpt.prune(str(tmp_path), keep=2)
    assert ckpt.committed_steps(str(tmp_path)) == [100, 150]


def test_no_valid_checkpoint_is_an_error_and_none_at_all_is_a_start(tmp_path: Path) -> None:
    assert ckpt.load_newest(str(tmp_path), pytest.fail) is None
    ckpt.save(str(tmp_path), state(1))
    flip_byte(tmp_path / ckpt.folder_name(1))
    with pytest.raises(StorageError, match="no checkpoint of this run is valid"):
        ckpt.load_newest(str(tmp_path), lambda text: None)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    ckpt.save(str(tmp_path), state(1))
    folder = tmp_path / ckpt.folder_name(1)
    evil = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    (folder / "model.safetensors").write_bytes(evil)
    marker = json.loads((folder / "COMMIT.json").read_text())
    marker["files"]["model.safetensors"] = {"bytes": len(evil), "digest": storage.digest(evil)}
    (folder / "COMMIT.json").write_text(json.dumps(marker))
    with pytest.raises(ckpt.InvalidCheckpoint):
        ckpt.load(str(tmp_path), 1)
    assert not (tmp_path / "ran").exists()


@given(st.sets(st.integers(0, 10**8)), st.integers(1, 5))
def test_the_newest_never_expire(steps: set[int], keep: int) -> None:
    gone = ckpt.expired(sorted(steps), keep=keep)
    left = sorted(steps - set(gone))
    assert len(left) == min(keep, len(steps))
    assert not gone or max(gone) < min(left)


def test_prune_deletes_only_expired(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        ckpt.save(str(tmp_path), state(step))
    ckpt.prune(str(tmp_path), keep=2)
    assert ckpt.committed_steps(str(tmp_path)) == [2, 3]
    assert storage.list_names(str(tmp_path)) == ["step-000000002", "step-000000003"]


@pytest.mark.parametrize("name", ["lars", "adamw"])
def test_an_optimizer_goes_on_as_if_never_stopped(tmp_path: Path, name: str) -> None:
    """Bit for bit, also for weights in channels-last memory, whose strides a checkpoint does not keep."""

    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4))
        model = layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model, make_optimizer(name, model, weight_decay=0.1)  # type: ignore[arg-type]

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        set_learning_rate(optimizer, 0.1 + seed)
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()

    whole, optimizer = make()
    for seed in range(4):
        step(whole, optimizer, seed)
        if seed == 1:
            saved = ckpt.Checkpoint(2, ckpt.model_tensors(whole), ckpt.optimizer_tensors(optimizer), {})
            ckpt.save(str(tmp_path), saved)
    model, optimizer = make()
    loaded = ckpt.load(str(tmp_path), 2)
    model.load_state_dict(loaded.model)
    ckpt.restore_optimizer(optimizer, loaded.optimizer)
    for seed in (2, 3):
        step(model, optimizer, seed)
    for name_, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name_]), name_


def test_a_copy_is_the_same_to_the_byte_and_a_checkpoint_of_its_new_run(tmp_path: Path) -> None:
    source, target = str(tmp_path / "a"), str(tmp_path / "b")
    ckpt.save(source, state(4))
    ckpt.save(source, state(8))
    found = ckpt.copy(source, 4, target, manifest="f")
    assert found.step == 4
    assert ckpt.committed_steps(target) == [4]
    for name in (*ckpt.FILES, ckpt.COMMIT_NAME):
        one, other = (Path(place) / ckpt.folder_name(4) / name for place in (source, target))
        assert one.read_bytes() == other.read_bytes()


def test_a_copy_of_a_damaged_or_absent_checkpoint_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    source, target = str(tmp_path / "a"), str(tmp_path / "b")
    ckpt.save(source, state(4))
    weights = tmp_path / "a" / ckpt.folder_name(4) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # as many bytes, another content
    with pytest.raises(StorageError, match="no valid checkpoint of step 4"):
        ckpt.copy(source, 4, target, manifest="f")
    with pytest.raises(StorageError, match="no valid checkpoint of step 5"):
        ckpt.copy(source, 5, target, manifest="f")
    assert not (tmp_path / "b").exists()


def test_a_copy_into_a_run_of_another_data_set_is_refused(tmp_path: Path) -> None:
    ckpt.save(str(tmp_path / "a"), state(4))
    with pytest.raises(DataError, match="another data set"):
        ckpt.copy(str(tmp_path / "a"), 4, str(tmp_path / "b"), manifest="g")
    assert not (tmp_path / "b").exists()
