"""Damaged real files against the decoders and the stage that makes views of them, in a process of bounded memory.

Every file starts as an image that decodes. The seed is fixed, so a failure repeats; its message names the mutation.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import io
import os
import random
import resource
import time
import warnings
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from simclr_ray.data.decode import REASONS, Limits, Rejected, decode, decode_reduced, read_header
from simclr_ray.views.policy import preset
from simclr_ray.views.stage import ViewStage
from tests.conftest import real_rows
from tests.unit.views.images import natural, png_of_16_bits

MUTATIONS = 10_000
WIDTH, HEIGHT = 112, 80  # of the photograph: enough to be reduced by 8
UNIT = 25
LIMITS = Limits(max_pixels=1_000_000)
STAGE = ViewStage(preset("imagenet-broad", size=8), seed=1, limits=LIMITS)  # so small that crops allow every reduction
# Decoding a million pixels takes 20 MB; the rest is room for the allocator's habits.
MEMORY = 128 << 20
SECONDS_PER_CALL = 2.0  # 20 ms on a quiet machine
SECONDS_TO_HANG = 120
TOKENS = (
    b"\x00",
    b"\xff",
    b"\x00\x00\x00\x00",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\x00\x00\x00\x80",
    b"\x01\x00",
    b"\x00\x01",
    b"\xff\xda",
    b"\xff\xd9",
    b"\xff\xc0\x00\x11\x08",
    b"\xff\xc2\x00\x11\x08",
    b"\xff\xdd\x00\x04",
    b"\x12\x01\x03\x00\x01\x00\x00\x00\x06\x00",
    b"IDAT",
    b"IEND",
    b"acTL",
    b"VP8X",
    b"\x2c",
    b"\x3b",
)


def photo() -> Image.Image:
    """A photograph, if matplotlib brings one; else an image like one."""
    spec = importlib.util.find_spec("matplotlib")
    for folder in spec.submodule_search_locations or [] if spec else []:
        path = Path(folder) / "mpl-data" / "sample_data" / "grace_hopper.jpg"
        if path.exists():
            return ImageOps.fit(Image.open(path).convert("RGB"), (WIDTH, HEIGHT))
    return Image.fromarray(natural(HEIGHT, WIDTH))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def files() -> list[tuple[str, bytes]]:
    """Name and bytes of good files of every kind."""
    colour = photo()
    grey = colour.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    alpha = colour.convert("RGBA")
    alpha.putalpha(grey)
    palette = colour.quantize(16)
    more = {"save_all": True, "append_images": [ImageOps.mirror(colour)]}
    exif = Image.Exif()
    exif[0x010F] = "camera"
    exif[0x0112] = 6
    made = [
        *(("JPEG", encode(colour, "JPEG", quality=90, subsampling=s)) for s in ("4:2:0", "4:2:2", "4:4:4")),
        ("JPEG turned", encode(colour, "JPEG", exif=exif, xmp=b'<x tiff:Orientation="3"/>')),
        ("JPEG grey", encode(grey, "JPEG")),
        ("JPEG restarts", encode(colour, "JPEG", restart_marker_blocks=3)),
        ("JPEG progressive", encode(colour, "JPEG", progressive=True)),
        ("JPEG CMYK", encode(colour.convert("CMYK"), "JPEG")),
        ("JPEG CMYK progressive", encode(colour.convert("CMYK"), "JPEG", progressive=True)),
        ("JPEG pair", encode(colour, "MPO", **more)),
        ("PNG", encode(colour, "PNG", exif=exif)),
        ("PNG 16", encode(deep, "PNG")),
        ("PNG 16 colour", png_of_16_bits(np.asarray(colour).astype(np.uint16) * 257)),
        ("PNG palette", encode(palette, "PNG", transparency=1)),
        ("PNG alpha", encode(alpha, "PNG")),
        ("PNG animated", encode(colour, "PNG", **more)),
        ("PNG 1", encode(colour.convert("1"), "PNG")),
        ("WebP", encode(colour, "WEBP")),
        ("WebP lossless", encode(alpha, "WEBP", lossless=True, exif=exif)),
        ("WebP animated", encode(colour, "WEBP", **more)),
        ("GIF", encode(palette, "GIF", comment=b"comment" * 50)),
        ("GIF animated", encode(colour, "GIF", **more)),
        ("BMP", encode(colour, "BMP")),
        ("BMP palette", encode(palette, "BMP")),
        ("TIFF", encode(colour, "TIFF", tiffinfo={0x0112: 8})),
        ("TIFF LZW", encode(colour, "TIFF", compression="tiff_lzw")),
        ("TIFF JPEG", encode(colour, "TIFF", compression="jpeg")),
        ("TIFF deflate", encode(alpha, "TIFF", compression="tiff_adobe_deflate")),
        ("TIFF 16", encode(deep, "TIFF", big_tiff=True)),
    ]
    return made + [("PNG real", row.image) for row in real_rows(3)]


def mutate(data: bytes, others: list[tuple[str, bytes]], rng: random.Random) -> bytes:
    """Damage of one of six kinds; two thirds of it in the header."""
    out = bytearray(data)
    reach = min(len(out), rng.choice((64, 700, len(out))))
    place = rng.randrange(reach)
    match rng.randrange(6):
        case 0:
            for _ in range(rng.choice((1, 1, 2, 5, 20))):
                out[rng.randrange(reach)] ^= 1 << rng.randrange(8)
        case 1:
            for _ in range(rng.choice((1, 2, 4))):
                out[rng.randrange(reach)] = rng.randrange(256)
        case 2:
            for _ in range(rng.choice((1, 2, 4))):
                token = rng.choice(TOKENS)
                place = rng.randrange(reach)
                out[place : place + len(token)] = token
        case 3:
            del out[place : place + rng.choice((1, 2, 8, 64, len(out)))]
        case 4:  # a piece of another file, in place of as much or between
            _, other = rng.choice(others)
            start, length = rng.randrange(len(other)), rng.choice((2, 16, 200, len(other)))
            out[place : place + rng.choice((0, length))] = other[start : start + length]
        case _:  # a piece of itself once more
            start = rng.randrange(len(out))
            out[place:place] = out[start : start + rng.choice((4, 64, 1000))] * rng.choice((1, 1, 3))
    # Most of the damaged PNGs get past their checksums.
    return with_checksums(bytes(out)) if data.startswith(b"\x89PNG") and rng.random() < 0.8 else bytes(out)


def with_checksums(png: bytes) -> bytes:
    """The file with right sums after all chunks up to the first that does not fit."""
    out = bytearray(png)
    at = 8
    while at + 12 <= len(out):
        end = at + 8 + int.from_bytes(out[at : at + 4], "big")
        if end + 4 > len(out):
            break
        out[end : end + 4] = zlib.crc32(out[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(out)


def check(data: bytes, rng: random.Random, buffer: np.ndarray, reductions: Counter[int]) -> str:
    """Every promise about one file; "accepted" or the reason of its rejection. Counts the reductions applied."""
    header = read_header(data, LIMITS)
    out = decode(data, LIMITS)
    if isinstance(out, Rejected):
        assert out.reason in REASONS
        assert 0 < len(out.detail) <= 160
        assert out.detail.isascii()
        assert out.detail.isprintable()
        assert "MemoryError" not in out.detail, out
        if isinstance(header, Rejected):
            assert header == out
            return out.reason
    else:
        assert not isinstance(header, Rejected), header
        assert out.shape == (header.height, header.width, 3)
        assert out.dtype == np.uint8
        assert out.flags.writeable
        assert header.height * header.width <= LIMITS.max_pixels
    if rng.random() < 0.5:
        again = decode_reduced(data, header, LIMITS, reduction=rng.choice((1, 2, 4, 8)), buffer=buffer)
        assert isinstance(again, Rejected) == isinstance(out, Rejected)
        if isinstance(again, Rejected):
            assert again == out
        else:
            reductions[again.reduction] += 1
            sides = tuple(-(-side // again.reduction) for side in (header.height, header.width))
            assert again.pixels.shape == (*sides, 3)
            assert again.reduction > 1 or np.array_equal(again.pixels, out)
    return out.reason if isinstance(out, Rejected) else "accepted"


def check_stage(files: list[bytes], outcomes: list[str], good: bytes) -> None:
    """As many rows out as in, and rejected is what `decode` rejects, for the same reason."""
    images = np.array([*files, good], dtype=object)
    numbers = np.arange(len(images))
    out = STAGE.columns({"image": images, "sample_id": numbers, "unit": numbers * 0, "epoch": numbers * 0})
    assert out["views"].shape == (len(images), 2, 8, 8, 3)
    rejected = [code for code in range(len(files)) if outcomes[code] != "accepted"]
    assert np.flatnonzero(out["rejected_id"] >= 0).tolist() == rejected
    assert [REASONS[code] for code in out["reason"][rejected]] == [outcomes[code] for code in rejected]


def bound_memory() -> None:
    torch.set_num_threads(1)
    check_stage([], [], encode(photo(), "JPEG"))  # libraries are loaded when they are first used
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)


def fuzz(sources: list[tuple[str, bytes]], seed: int) -> tuple[Counter[tuple[str, str]], Counter[int], float]:
    """Outcomes by kind of file, reductions that were applied, and the longest time of one file."""
    # Pillow warns of odd metadata on its way to our answer, and libtiff prints what it thinks of it.
    warnings.simplefilter("ignore")
    terminal = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    faulthandler.dump_traceback_later(SECONDS_TO_HANG, exit=True, file=terminal)
    outcomes: Counter[tuple[str, str]] = Counter()
    reductions: Counter[int] = Counter()
    unit: list[tuple[bytes, str]] = []
    slowest = 0.0
    buffer = np.empty(3 * HEIGHT * WIDTH, np.uint8)
    for number in range(MUTATIONS):
        rng = random.Random(f"{seed} {number}")
        name, data = sources[number % len(sources)]
        damaged = mutate(data, sources, rng)
        start = time.process_time()
        try:
            outcome = check(damaged, rng, buffer, reductions)
        except BaseException as error:
            raise AssertionError(f"mutation {number} of seed {seed}, of a {name}: {error!r}") from error
        slowest = max(slowest, time.process_time() - start)
        outcomes[name, outcome] += 1
        unit.append((damaged, outcome))
        if len(unit) == UNIT:
            try:
                check_stage(*map(list, zip(*unit, strict=True)), good=sources[0][1])
            except BaseException as error:
                raise AssertionError(f"the {UNIT} mutations up to {number} of seed {seed}: {error!r}") from error
            unit.clear()
    faulthandler.cancel_dump_traceback_later()
    return outcomes, reductions, slowest


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is bounded by way of /proc")
def test_no_damage_raises_hangs_or_costs_memory():
    sources = files()
    for name, data in sources:
        assert not isinstance(decode(data, LIMITS), Rejected), name
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=bound_memory) as pool:
        # A crash of the process is an error here.
        outcomes, reductions, slowest = pool.submit(fuzz, sources, 1).result()
    assert slowest < SECONDS_PER_CALL
    assert min(reductions[factor] for factor in (1, 2, 4, 8)) > 50, reductions
    for family in {name.split()[0] for name, _ in sources}:
        counts = [0, 0]
        for (name, outcome), number in outcomes.items():
            if name.split()[0] == family:
                counts[outcome == "accepted"] += number
        assert min(counts) > 100, (family, counts)  # else the damage is too large or too small to find anything


def test_the_memory_bound_bounds():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=bound_memory) as pool:
        image = Image.new("RGB", (7000, 7000))
        out = pool.submit(decode, encode(image, "PNG"), Limits()).result()
    assert isinstance(out, Rejected)
    assert (out.reason, out.detail) == ("too_large", "asks for more memory than there is")
