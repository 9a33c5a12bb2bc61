"""Walking tars: the standard library's tarfile is the twin, and ranges hold exactly the samples that were counted."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simclr_ray.data import tar
from simclr_ray.errors import DataError

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
OTHER_TYPES = [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]


def make_tar(members: Sequence[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


def walk(data: bytes) -> list[tar.Member]:
    return list(tar.walk(lambda start, stop: data[start:stop], len(data)))


def grouped(data: bytes, unit_rows: int = 3) -> tar.TarGroups:
    return tar.groups(tar.walk(lambda start, stop: data[start:stop], len(data)), unit_rows)


def bodies(data: bytes, found: tar.TarGroups) -> list[list[tuple[str, bytes]]]:
    """Key and image of each sample of each range; gaps between ranges are read by nobody."""
    out: list[list[tuple[str, bytes]]] = []
    for (start, stop), rows in zip(pairwise(found.offsets), found.rows_per_group, strict=True):
        part = data[start:stop] if rows else b""
        out.append([(one.key, part[one.image.data : one.image.stop]) for one in tar.images(part)])
    return out


names = st.text("ab.", min_size=1, max_size=4).map(lambda text: f"f{text}") | st.text(
    st.characters(blacklist_characters="\0/", blacklist_categories=["Cs"]), min_size=1, max_size=120
)
paths = st.lists(names, min_size=1, max_size=3).map("/".join)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(paths, st.binary(max_size=1500), st.sampled_from([tarfile.REGTYPE] * 3 + OTHER_TYPES))),
    st.sampled_from(FORMATS[1:]),
)
def test_members_are_those_of_tarfile(wanted: list[tuple[str, bytes, bytes]], kind: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name, body, type_ in wanted:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = type_, "elsewhere"
            info.size = len(body) if type_ == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(body))
    data = buffer.getvalue()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        twin = [(m.name.rstrip("/"), m.offset, m.offset_data, m.size, m.isreg()) for m in archive]
    assert [(m.name.rstrip("/"), m.start, m.data, m.size, m.regular) for m in walk(data)] == twin


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["a.jpg", "d/" * 60 + "a.jpg", "x" * 90 + "/y.jpg"])
def test_long_names_of_every_format(kind: int, name: str) -> None:
    (member,) = walk(make_tar([(name, b"body")], kind))
    assert (member.name, member.size) == (name, 4)


def test_sizes_in_base_256_are_read() -> None:
    """GNU tar writes them above 8 GiB; this one claims 9 GiB, of which the file has nothing."""
    info = tarfile.TarInfo("huge.npy")
    info.size = 9 << 30
    header = info.tobuf(tarfile.GNU_FORMAT)
    seen = []
    size = len(header) + info.size + 1024
    for member in tar.walk(lambda start, stop: (seen.append((start, stop)), (header + bytes(stop))[start:stop])[1]
                           if stop < 1 << 20 else bytes(stop - start), size):  # fmt: skip
        assert (member.name, member.size) == ("huge.npy", 9 << 30)
    assert seen == [(0, 512)], "the body is not read"


@st.composite
def archives(draw: st.DrawFn) -> list[tuple[str, int]]:
    """Names and sizes: samples of 0 to 4 members, some without image, with strangers among them."""
    members: list[tuple[str, int]] = []
    for number in range(draw(st.integers(0, 12))):
        extensions = draw(st.lists(st.sampled_from(["jpg", "PNG", "cls", "json", "seg.png", "npy"]), unique=True))
        for extension in extensions:
            size = draw(st.sampled_from([0, 1, 511, 512, 513, 1400]))
            members.append((f"d/{number:03d}.{extension}", size))
            if draw(st.integers(0, 5)) == 0:
                members.append((draw(st.sampled_from(["d/.hidden.jpg", "README"])), draw(st.integers(0, 1400))))
    return members


def filled(members: Sequence[tuple[str, int]]) -> list[tuple[str, bytes]]:
    """The same with bodies, each of other bytes than its neighbours."""
    return [(name, bytes([number % 256]) * size) for number, (name, size) in enumerate(members)]


def expected_images(
    members: Sequence[tuple[str, bytes]], largest_image: int
) -> tuple[list[tuple[str, bytes]], int, int]:
    """The obvious twin: every sample's first image; samples without any; samples whose image is too large."""
    samples: dict[str, list[tuple[str, bytes]]] = {}
    for name, body in members:
        base = name.rpartition("/")[2]
        if "." in base[1:] and not base.startswith("."):
            samples.setdefault(name[: len(name) - len(base)] + base.split(".")[0], []).append((name, body))
    first = {
        key: next((b for n, b in some if n.lower().endswith((".jpg", ".png"))), None) for key, some in samples.items()
    }
    kept = [(key, body) for key, body in first.items() if body is not None and len(body) <= largest_image]
    large = sum(body is not None and len(body) > largest_image for body in first.values())
    return kept, sum(body is None for body in first.values()), large


@settings(deadline=None, max_examples=60)
@given(archives(), st.integers(1, 4), st.sampled_from([1200, 1 << 20]), st.sampled_from([600, 1 << 20]))
def test_ranges_hold_the_images_that_were_counted(
    sizes: list[tuple[str, int]], unit_rows: int, largest_image: int, largest_other: int
) -> None:
    members = filled(sizes)
    data = make_tar(members)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tar, "IMAGE_BYTES", largest_image)
        patch.setattr(tar, "OTHER_BYTES", largest_other)
        found = grouped(data, unit_rows)
    kept, without, large = expected_images(members, largest_image)
    ranges = bodies(data, found)
    assert [len(some) for some in ranges] == list(found.rows_per_group)
    assert [one for some in ranges for one in some] == kept
    assert (found.without_image, found.too_large, found.damage) == (without, large, None)
    assert all(rows <= unit_rows for rows in found.rows_per_group)
    assert list(found.offsets) == sorted(found.offsets)
    for (start, stop), rows in zip(pairwise(found.offsets), found.rows_per_group, strict=True):
        inside = walk(data[start:stop] + bytes(1024)) if rows else []
        assert all(m.size <= (largest_image if tar.is_image(m.name) else largest_other) for m in inside)


def test_a_range_without_large_members_is_not_cut() -> None:
    members = [(f"{i:03d}.{e}", b"x" * 700) for i in range(10) for e in ("jpg", "cls")]
    found = grouped(make_tar(members), 4)
    assert found.rows_per_group == (4, 4, 2)


def test_a_member_that_is_too_large_lies_between_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "OTHER_BYTES", 1000)
    data = make_tar([("a.jpg", b"A"), ("a.cls", b"1"), ("a.mp4", b"m" * 5000), ("b.jpg", b"B"), ("b.cls", b"2")])
    found = grouped(data)
    assert found.rows_per_group == (1, 0, 1)
    assert all(
        b"mmmm" not in data[a:b] for (a, b), n in zip(pairwise(found.offsets), found.rows_per_group, strict=True) if n
    )


def test_large_images_make_small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "GROUP_BYTES", 10_000)
    data = make_tar([(f"{i}.jpg", b"x" * 4000) for i in range(5)])
    found = grouped(data, 64)
    assert found.rows_per_group == (2, 2, 1)
    assert max(stop - start for start, stop in pairwise(found.offsets)) <= 10_240


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (["a.jpg", "b.jpg", "a.cls"], 'sample "a" are not neighbours'),
        (["a.jpg", "b.jpg", "a.jpg"], 'sample "a" are not neighbours'),
        (["a.jpg", "a.JPG"], '"a.JPG" is there twice'),
        (["x\x1b/a.jpg", "b.jpg", "x\x1b/a.cls"], r'sample "x\x1b/a"'),
    ],
)
def test_samples_that_cannot_be_told_apart_are_a_sentence(members: list[str], words: str) -> None:
    with pytest.raises(DataError) as caught:
        tar.groups(walk(make_tar([(name, b"") for name in members])), 3, where="s3://b/0.tar")
    assert words in str(caught.value)
    assert "s3://b/0.tar" in str(caught.value)
    assert "write the tar" in str(caught.value)
    assert str(caught.value).replace("\n", " ").isprintable()


@settings(deadline=None, max_examples=60)
@given(archives(), st.data())
def test_a_tar_cut_anywhere_gives_the_samples_before_the_cut(sizes: list[tuple[str, int]], data: st.DataObject) -> None:
    members = filled(sizes)
    whole = make_tar(members)
    end = max((member.stop for member in walk(whole)), default=0)
    cut = data.draw(st.integers(0, end + 511))
    part = whole[:cut]
    found = grouped(part, 3)
    assert found.damage is not None
    assert str(cut) in found.damage.replace(",", "") or "byte" in found.damage
    kept = [one for some in bodies(part, found) for one in some]
    every = expected_images(members, 1 << 20)[0]
    assert kept == every[: len(kept)]
    complete = [
        m for m in walk(whole) if m.stop <= cut and m.regular and tar.is_image(m.name) and tar.sample_key(m.name)
    ]
    assert {key for key, _ in kept} == {tar.sample_key(m.name) for m in complete}


@settings(deadline=None, max_examples=60)
@given(archives(), st.integers(0, 10_000), st.integers(1, 255))
def test_a_flipped_byte_never_raises_anything_else(sizes: list[tuple[str, int]], at: int, change: int) -> None:
    members = filled(sizes)
    data = bytearray(make_tar(members))
    data[at % len(data)] ^= change
    try:
        found = grouped(bytes(data))
    except DataError:
        return  # a name that now is another sample's
    assert found.rows <= len(members)


@pytest.mark.parametrize("name", ["x", ".hidden.jpg", "a/.b.jpg", "a.d/noext", "", "dir/", "a/b.c.d/"])
def test_names_that_belong_to_no_sample(name: str) -> None:
    assert tar.sample_key(name) is None


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [
        ("a.jpg", "a", "jpg"),
        ("x.y/a.seg.PNG", "x.y/a", "seg.png"),
        ("./1.cls", "./1", "cls"),
        ("../a.jpg", "../a", "jpg"),
    ],
)
def test_keys(name: str, key: str, extension: str) -> None:
    assert (tar.sample_key(name), tar.extension(name)) == (key, extension)


def windows(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[tar.Windows, Callable[[], list[tar.Member]]]:
    """A reader of a stored tar that behaves as for an object store."""
    read = tar.Windows(str(path), path.stat().st_size)
    monkeypatch.setattr(read, "_local", False)
    return read, lambda: list(tar.walk(read, path.stat().st_size))


def test_bodies_that_are_large_are_jumped_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.tar").write_bytes(make_tar([(f"{i}.jpg", bytes(5 << 20)) for i in range(6)]))
    read, walked = windows(tmp_path / "t.tar", monkeypatch)
    assert [member.size for member in walked()] == [5 << 20] * 6
    assert read.bytes < 1 << 20
    assert read.requests <= 8


def test_bodies_that_are_small_are_read_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [(f"{i:05d}.{e}", bytes(n)) for i in range(400) for e, n in (("jpg", 40_000), ("txt", 90), ("json", 400))]
    data = make_tar(members)
    (tmp_path / "t.tar").write_bytes(data)
    read, walked = windows(tmp_path / "t.tar", monkeypatch)
    assert len(walked()) == 1200
    assert read.bytes <= len(data)
    assert read.requests <= 9, "64 KiB, doubled up to 8 MiB"
