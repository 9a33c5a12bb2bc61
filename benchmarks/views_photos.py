"""What benchmarks/views.py reads: crops of real photographs, of the sizes wanted, encoded anew as JPEG.

Photographs, because a decoder's time follows the bytes: noise would cost several times as much, a gradient a fraction.
The same photographs and seed give the same crops.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

MOST_PHOTOS = 64
LONGEST = 2560
"""Photographs are reduced to this long side at first, as a camera's full resolution has no detail."""

BACKGROUNDS = Path("/usr/share/backgrounds/mate/nature")
"""Of Debian's mate-backgrounds, whose other folders hold drawings."""
OF_PACKAGES = {
    "skimage": ("scikit-image", "data", ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png")),
    "sklearn": ("scikit-learn", "datasets/images", ("china.jpg", "flower.jpg")),
}

NONE_FOUND = """\
no photographs: name a folder of JPEG or PNG files with --photos, or
    apt-get install mate-backgrounds
    pip install scikit-image scikit-learn    (six small ones)"""


class Case(NamedTuple):
    """Images of one size, and what is made of them."""

    name: str
    width: int
    height: int
    images: int
    quality: int
    preset: str
    size: int
    """Side of a view."""


CASES = (
    Case("500 x 375", 500, 375, 48, 90, "imagenet", 224),
    Case("1024 x 768", 1024, 768, 32, 90, "imagenet", 224),
    Case("341 x 256", 341, 256, 48, 90, "imagenet", 224),
    Case("32 x 32", 32, 32, 512, 95, "cifar", 32),
)


class Photos(NamedTuple):
    images: list[Image.Image]
    sources: list[str]
    """Names of packages, or of the folder."""


def find_photos(folder: Path | None) -> Photos:
    """Those of the folder, or else of packages that are installed here.

    Raises:
        SystemExit: There are none, or none as large as the largest case; says how to get some.
    """
    found = dict(_of_packages()) if folder is None else {folder.name: _pictures(folder)}
    files = [file for files in found.values() for file in files]
    if not files:
        raise SystemExit(NONE_FOUND if folder is None else f"no JPEG or PNG files in {folder}")
    if len(files) > MOST_PHOTOS:
        files = [files[i] for i in np.random.default_rng(0).choice(len(files), MOST_PHOTOS, replace=False)]
    photos = Photos([_open(file) for file in files], [name for name, of_it in found.items() if of_it])
    for case in CASES:
        if not _large_enough(photos, case):
            raise SystemExit(f"no photograph has {case.width} x {case.height} pixels: name a folder of larger ones")
    return photos


def encoded_crops(photos: Photos, case: Case, images: int, seed: int = 0) -> list[bytes]:
    """JPEGs of the case's size, 4:2:0: boxes of all photographs in turn, random in place and reduction."""
    rng = np.random.default_rng(seed)
    large = _large_enough(photos, case)
    crops = []
    for number in range(images):
        photo = large[number % len(large)]
        most = min(photo.width / case.width, photo.height / case.height)
        factor = rng.uniform(1, most)
        width, height = factor * case.width, factor * case.height
        left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
        crop = photo.resize(
            (case.width, case.height), Image.Resampling.LANCZOS, box=(left, top, left + width, top + height)
        )
        file = io.BytesIO()
        crop.save(file, "JPEG", quality=case.quality, subsampling="4:2:0")
        crops.append(file.getvalue())
    return crops


def _large_enough(photos: Photos, case: Case) -> list[Image.Image]:
    return [photo for photo in photos.images if photo.width >= case.width and photo.height >= case.height]


def _of_packages() -> Iterator[tuple[str, list[Path]]]:
    yield "mate-backgrounds", _pictures(BACKGROUNDS)
    for module, (package, folder, names) in OF_PACKAGES.items():
        spec = importlib.util.find_spec(module)  # not imported: its files are all that is wanted
        for place in (spec.submodule_search_locations or ()) if spec else ():
            yield package, [file for name in names if (file := Path(place, folder, name)).exists()]


def _pictures(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))


def _open(file: Path) -> Image.Image:
    with Image.open(file) as image:
        image.draft("RGB", (LONGEST, LONGEST))
        photo = image.convert("RGB")
    photo.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return photo
