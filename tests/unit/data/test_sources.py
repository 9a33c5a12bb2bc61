"""What a source is, told by its names, and lists of every form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simclr_ray import storage
from simclr_ray.data.sources import Found, Labels, SourceKind, look
from simclr_ray.errors import ConfigError, DataError


def seen(source: Path, *, kind: SourceKind | None = None, labels: Labels = "none", column: str | None = None) -> Found:
    work = str(source.parent / "work")
    return look(str(source), work, kind=kind, labels=labels, leave_out=[f"{work}/"], column=column)


def rows(found: Found) -> list[tuple[str, str | None]]:
    return [(row["uri"], row["label"]) for table in found.tables() for row in table.to_pylist()]


def folder(tmp_path: Path, *names: str) -> Path:
    for name in names:
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "source"


@pytest.mark.parametrize(
    ("names", "kind", "taken"),
    [
        (["a.jpg", "b/c.PNG", "notes.txt", "d.json"], "objects", 2),
        (["0.tar", "1.tar", "readme.md"], "tar", 2),
        (["0.parquet", "x/1.parquet"], "parquet", 2),
        (["0.tar", "0.parquet", "0_stats.json", "1.tar", "1.parquet"], "tar", 2),
        (["0.tar", "0.parquet", "1.tar"], "tar", 2),
    ],
    ids=["images", "tars", "parquet", "img2dataset", "img2dataset, still running"],
)
def test_a_folder_is_what_its_names_say(tmp_path: Path, names: list[str], kind: str, taken: int) -> None:
    found = seen(folder(tmp_path, *names))
    assert (found.kind, len(rows(found))) == (kind, taken)


@pytest.mark.parametrize("names", [["0.tar", "other.parquet"], ["a.jpg", "b.parquet"], ["a.jpg", "0.tar"]])
def test_several_kinds_are_asked_about(tmp_path: Path, names: list[str]) -> None:
    source = folder(tmp_path, *names)
    with pytest.raises(ConfigError, match="several kinds") as caught:
        seen(source)
    for name in names:
        kind: SourceKind = {"jpg": "objects", "tar": "tar", "parquet": "parquet"}[name.rpartition(".")[2]]  # type: ignore[assignment]
        assert f"--kind {kind}" in str(caught.value)
        assert rows(seen(source, kind=kind)) == [(f"{source}/{name}", None)]


def test_one_shard_is_a_source(tmp_path: Path) -> None:
    source = folder(tmp_path, "0.tar")
    assert rows(seen(source / "0.tar")) == [(f"{source}/0.tar", None)]
    assert seen(source / "0.tar").kind == "tar"


LISTS: dict[str, tuple[str, str, Labels, str | None]] = {
    "text": ("l.txt", 'a b.png\n\n c,"d".jpg \n', "none", None),
    "table": ("l.csv", '"a b.png",x\n"c,""d"".jpg",y\n', "list", None),
    "with a header": ("l.csv", 'id,URL,Label\n1,"a b.png",x\n2,"c,""d"".jpg",y\n', "list", None),
    "with a named column": ("l.csv", 'file,url\n"a b.png",u\n"c,""d"".jpg",v\n', "none", "file"),
}


@pytest.mark.parametrize(("name", "text", "labels", "column"), LISTS.values(), ids=LISTS)
def test_lists_of_text(tmp_path: Path, name: str, text: str, labels: Labels, column: str | None) -> None:
    (tmp_path / name).write_text(text)
    found = seen(tmp_path / name, labels=labels, column=column)
    assert found.kind == "objects"
    names = ["x", "y"] if labels == "list" else [None, None]
    assert rows(found) == [(f"{tmp_path}/a b.png", names[0]), (f'{tmp_path}/c,"d".jpg', names[1])]


@pytest.mark.parametrize("column", ["uri", "URL", "path", "where"])
def test_lists_in_parquet_are_read_by_row_groups(tmp_path: Path, column: str) -> None:
    uris = [f"s3://bucket/{number}.jpg" for number in range(10)]
    table = pa.table({column: [*uris[:4], None, *uris[4:], ""], "label": list(range(12))})
    pq.write_table(table, tmp_path / "l.parquet", row_group_size=5)
    found = seen(tmp_path / "l.parquet", labels="list", column="where" if column == "where" else None)
    assert found.kind == "objects"
    assert len(list(found.tables())) == 3
    assert rows(found) == [(uri, str(number + (number > 3))) for number, uri in enumerate(uris)]


def test_a_list_of_tars_is_tars(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("s3://bucket/0.tar\ns3://bucket/1.tar\n")
    assert seen(tmp_path / "l.txt").kind == "tar"
    (tmp_path / "l.txt").write_text("s3://bucket/0.tar\ns3://bucket/1\n")
    assert seen(tmp_path / "l.txt").kind == "objects", "each line is an image: they need no suffix"


def test_a_parquet_file_of_images_is_no_list(tmp_path: Path) -> None:
    """It may have a column of URLs, which say where its images once came from."""
    (tmp_path / "source").mkdir()
    pq.write_table(pa.table({"image": [b"x"], "url": ["https://example.org/a.png"]}), tmp_path / "source" / "a.parquet")
    assert seen(tmp_path / "source" / "a.parquet").kind == "parquet"


@pytest.mark.parametrize("scheme", ["http", "https", "HTTPS"])
def test_web_addresses_are_read_only_where_it_is_allowed(
    tmp_path: Path, scheme: str, configure: Callable[[storage.StorageSettings], None]
) -> None:
    (tmp_path / "l.txt").write_text(f"{scheme}://user:hunter2@example.org/a.png\n")
    with pytest.raises(ConfigError, match="not read") as caught:
        seen(tmp_path / "l.txt")
    assert "hunter2" not in str(caught.value)
    configure(storage.StorageSettings(allow_http=True))
    assert len(rows(seen(tmp_path / "l.txt"))) == 1


@pytest.mark.parametrize("name", ["/etc/hostname", "file:///etc/hostname"])
def test_a_list_in_a_store_may_not_name_files_of_this_machine(tmp_path: Path, name: str) -> None:
    lists = f"memory://{tmp_path.name}-{name.count('/')}"

    def listed() -> list[tuple[str, str | None]]:
        return rows(look(f"{lists}/l.txt", str(tmp_path), kind=None, labels="none", leave_out=[], column=None))

    storage.write_bytes(f"{lists}/l.txt", f"a.png\n{name}\n".encode())
    with pytest.raises(ConfigError, match="may not name files of the machines"):
        listed()
    storage.write_bytes(f"{lists}/l.txt", b"a.png\ns3://bucket/b.png\n")
    assert [uri for uri, _ in listed()] == [f"{lists}/a.png", "s3://bucket/b.png"]
    (tmp_path / "l.txt").write_text(f"a.png\n{name}\n")
    assert len(rows(seen(tmp_path / "l.txt"))) == 2


def test_a_list_without_labels_is_a_sentence(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["a.png"]}), tmp_path / "l.parquet")
    with pytest.raises(DataError, match="no labels"):
        seen(tmp_path / "l.parquet", labels="list")


def test_nothing_of_the_kind_wanted_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no files of the kind tar") as caught:
        seen(folder(tmp_path, "a.jpg", "b.jpg"), kind="tar")
    assert "2 objects" in str(caught.value)
