"""Reports of real runs: whole in each state of a run, without a stranger's markup and without a secret."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from simclr_ray import report, storage
from simclr_ray.cli import main
from simclr_ray.data.manifest import Manifest, read_manifest
from simclr_ray.errors import ConfigError
from simclr_ray.publish.page import BEGIN
from simclr_ray.publish.runs import find_runs
from tests.integration.report_runs import HOSTILE, SECRET
from tests.servers.seaweed import Seaweed
from tests.unit.publish.made import made_run, results

pytestmark = pytest.mark.integration


class Page(HTMLParser):
    """What a browser would make of a report: elements, attributes and texts."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.script = ""
        self._inside = ""
        self.feed(data.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.script += data
        elif self._inside != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def pictures(self) -> Iterator[bytes]:
        for tag, attributes in self.tags:
            source = attributes.get("src") or ""
            if tag == "img" and source:
                yield base64.b64decode(source.partition("base64,")[2])


@pytest.fixture(scope="module")
def written(hostile_run: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    output = tmp_path_factory.mktemp("report") / "report.html"
    report([str(hostile_run)], str(output), embedded=100)
    return output.read_bytes()


def test_every_section_of_a_run_is_there(written: bytes) -> None:
    page = Page(written)
    for words in (
        "8 of 8 (100%)", "NT-Xent loss", "Waiting for data", "trained encoder", "Cosine similarity of projections",
        "Principal components 1 and 2", "Directions in use", "Nearest neighbours", "images in quarantine",
        "attempt 1: steps 1 to 8", "loss.temperature", "view b: crop",
    ):  # fmt: skip
        assert words in page.text, words
    assert sum(tag == "figure" and "lines" in str(attributes.get("class")) for tag, attributes in page.tags) >= 8
    assert len(list(page.pictures())) > 100


def test_hostile_names_are_text_and_nothing_else(written: bytes) -> None:
    page = Page(written)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "pwned" not in page.script
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), attributes
        assert tag not in ("iframe", "object", "embed", "base", "link", "form")
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), value
    for name in HOSTILE[:3]:
        assert name in page.text
    assert r"a\nb\r\x1b[2J\x00\u202ec" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert not set(written) & {0, 0x1B}


def test_the_policy_lets_the_page_do_nothing_but_its_own_script(written: bytes) -> None:
    page = Page(written)
    (policy,) = (
        str(attributes["content"])
        for tag, attributes in page.tags
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert f"script-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert not any("style" in attributes for _, attributes in page.tags)


def test_no_secret_is_in_it(written: bytes) -> None:
    assert SECRET.encode() not in written
    assert b"images.example/cat.jpg" in written


def test_pictures_are_encoded_anew(written: bytes) -> None:
    for data in Page(written).pictures():
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            assert picture.format in ("PNG", "JPEG")
            assert not picture.getexif()
            assert set(picture.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


def test_without_images_none_is_in_it(hostile_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    assert main(["report", str(hostile_run), "-o", str(output), "--no-images", "--embedded", "50"]) == 0
    page = Page(output.read_bytes())
    assert list(page.pictures()) == []
    assert b"data:image" not in output.read_bytes()
    assert "Principal components 1 and 2" in page.text
    assert "--no-images" in page.text


def test_a_run_that_has_only_begun(tmp_path: Path, data_set: Manifest) -> None:
    """No record, no checkpoint, no evaluation; and one whose images are gone."""
    run = made_run(tmp_path / "run", data_set, steps=0, status="running")
    gone = made_run(tmp_path / "gone", data_set, evaluation=results(0.5), status="failed")
    resolved = tmp_path / "gone" / "resolved.yaml"
    resolved.write_text(resolved.read_text().replace(data_set.folder, str(tmp_path / "nowhere")))
    report([run.uri, gone.uri], str(tmp_path / "report.html"))
    page = Page((tmp_path / "report.html").read_bytes())
    assert "stopped without a word" in page.text
    assert "no checkpoint yet" in page.text
    assert "The training images are not to be had" in page.text
    assert "Not evaluated yet" in page.text
    assert "No attempt has left a record yet" in page.text


def test_runs_beside_each_other(hostile_run: Path, tmp_path: Path, data_set: Manifest) -> None:
    other = made_run(tmp_path / "other", data_set, loss__temperature=0.05, evaluation=results(0.6))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("loss: {temperature: 0.07}\n")
    report([str(hostile_run), other.uri], str(tmp_path / "report.html"), embedded=0, recipe=str(recipe))
    page = Page((tmp_path / "report.html").read_bytes())
    assert "Losses of these runs do not compare" in page.text
    assert re.search(r"loss.temperature 0.1 0.07 0.5 0.05", page.text)
    with pytest.raises(ConfigError, match="1 to 8"):
        report([other.uri] * 9, str(tmp_path / "many.html"))


def test_it_replaces_a_report_and_nothing_else(tmp_path: Path, data_set: Manifest) -> None:
    run = made_run(tmp_path / "run", data_set)
    output = tmp_path / "deep" / "report.html"
    report([run.uri], str(output), embedded=0, images=False)
    first = output.read_bytes()
    run.update(status="failed")
    report([run.uri], str(output), embedded=0, images=False)
    assert output.read_bytes() != first
    assert output.read_bytes().startswith(BEGIN)
    precious = tmp_path / "thesis.html"
    precious.write_text("<!doctype html>\n<p>mine</p>")
    with pytest.raises(ConfigError, match="no report"):
        report([run.uri], str(precious), embedded=0)
    assert precious.read_text().endswith("mine</p>")
    with pytest.raises(ConfigError, match="folder"):
        report([run.uri], str(tmp_path), embedded=0)


def test_a_run_in_a_bucket_and_a_report_there(hostile_run: Path, s3_folder: str) -> None:
    uri = f"{s3_folder}/run"
    for file, _ in storage.list_files(str(hostile_run)):
        if "/ray/" not in file:
            storage.write_bytes(uri + file.removeprefix(str(hostile_run)), storage.read_bytes(file))
    target = f"{s3_folder}/report.html"
    assert report([uri], target, embedded=40) == target
    page = Page(storage.read_bytes(target))
    assert "8 of 8 (100%)" in page.text
    assert "Nearest neighbours" in page.text
    report([uri], target, embedded=0, images=False)  # a version is swapped there
    assert b"data:image" not in storage.read_bytes(target)
    assert find_runs([s3_folder]) == [uri]
    assert main(["runs", "best", s3_folder]) == 0


def test_images_are_looked_for_where_the_run_finds_them(
    s3: Seaweed, s3_folder: str, data_set: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on this machine whose images lie in a store that only its settings name."""
    for file, _ in storage.list_files(data_set.folder):
        storage.write_bytes(s3_folder + file.removeprefix(data_set.folder), storage.read_bytes(file))
    there = read_manifest(s3_folder)
    run = made_run(tmp_path / "run", there, storage__endpoint=s3.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    before = storage.current()
    report([run.uri], str(tmp_path / "report.html"), embedded=0)
    assert storage.current() == before
    assert "view b: crop" in Page((tmp_path / "report.html").read_bytes()).text
