"""The Triton kernels against their twin in torch: interpreted on a CPU, compiled for GPUs that need not be there, and
run where there is one. The interpreter sees neither races, nor TF32, nor speed.
"""

import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from simclr_ray.learn import nt_xent as production
from simclr_ray.learn import reference
from simclr_ray.learn.tiles import ALL_QUADRANTS, RowSums, TorchTiles

# Triton decides at its import whether it interprets, so nothing here imports it outside a function.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

TEMPERATURE = 0.1
SOME_QUADRANTS = ((1, 0), (1, 1))

Run = Callable[..., None]


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Run]:
    """Calls a check in the one process that interprets."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_interpret) as pool:
        yield lambda check, *args: pool.submit(check, "cpu", *args).result()


def _kernels(programs: int = 512) -> tuple[Any, Any]:
    from simclr_ray.learn.triton_tiles import TritonTiles

    return TritonTiles(TEMPERATURE, programs=programs), TorchTiles(TEMPERATURE, 32)


def _unit(images: int, dim: int, device: str, seed: int) -> Tensor:
    z = torch.randn(2, images, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(z, dim=2).to(device)


def _normalizer(images: int, device: str, seed: int) -> Tensor:
    return torch.rand(2, images, generator=torch.Generator().manual_seed(seed)).to(device)


def _assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], **options: Any) -> None:
    for x, y in zip(got, expected, strict=True):
        size = float(y.nan_to_num(0.0, 0.0, 0.0).norm())  # a gradient has numbers that are small by cancellation
        torch.testing.assert_close(x, y, rtol=2e-5, atol=1e-6 * size, **options)


def _lay_out(z: Tensor, layout: str) -> Tensor:
    """The same numbers as a part of the gathered columns, or as the ring brings them."""
    if layout == "slice":
        return torch.nn.functional.pad(z, (0, 0, 5, 3))[:, 5 : 5 + z.shape[1]]
    if layout == "ring":
        return z.transpose(0, 1).contiguous().transpose(0, 1)
    return z


def check_own(device: str, images: int, dim: int, programs: int) -> None:
    z, w = _unit(images, dim, device, 0), _normalizer(images, device, 1)
    results = []
    for kernel in _kernels(programs):
        sums = kernel.new_sums(images, z)
        gradient = torch.ones_like(z)
        for _ in range(2):  # the second time onto what is there
            kernel.add_own(z, sums)
            kernel.own_gradient(z, w, gradient)
        results.append((*sums, gradient))
    _assert_same(*results)


OWN = {
    "two blocks, the columns shared out": (70, 33, 512),
    "one share of the columns": (70, 33, 1),
    "whole blocks": (64, 64, 512),
    "less than a block": (3, 5, 512),
    "one image, no pairs": (1, 1, 512),
    "nothing": (0, 8, 512),
}


@pytest.mark.parametrize("case", OWN)
def test_own_block(interpreted, case):
    interpreted(check_own, *OWN[case])


def check_block(
    device: str, n: int, k: int, dim: int, layout: str, mirrored: bool, quadrants: tuple[tuple[int, int], ...]
) -> None:
    x, y = _unit(n, dim, device, 0), _lay_out(_unit(k, dim, device, 1), layout)
    w_x, w_y = _normalizer(n, device, 2), _normalizer(k, device, 3)
    here, there = slice(2, 2 + n), slice(3 + n, 3 + n + k)  # among more, which must stay as they are
    results = []
    for kernel in _kernels(programs=2):  # some blocks of columns in every share
        sums = kernel.new_sums(n + k + 4, x)
        gradient = torch.ones((2, n + k + 4, dim), device=device)
        mirror = sums.images(there) if mirrored else None
        kernel.add_block(x, y, sums.images(here), mirror, quadrants)
        mirror = gradient[:, there] if mirrored else None
        kernel.block_gradient(x, y, w_x, w_y, gradient[:, here], mirror, quadrants)
        results.append((*sums, gradient))
    _assert_same(*results)


BLOCKS = [(70, 200, 24, "whole"), (65, 5, 40, "slice"), (3, 66, 128, "ring"), (0, 3, 8, "ring"), (3, 0, 8, "slice")]


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("quadrants", [ALL_QUADRANTS, SOME_QUADRANTS])
@pytest.mark.parametrize("case", BLOCKS)
def test_block(interpreted, case, quadrants, mirrored):
    interpreted(check_block, *case, mirrored, quadrants)


def check_nan(device: str) -> None:
    x, y = _unit(6, 8, device, 0), _unit(70, 8, device, 1)
    x[0, 3] = math.nan
    y[1, 66] = math.nan
    w_x, w_y = _normalizer(6, device, 2), _normalizer(70, device, 3)
    results = []
    for kernel in _kernels():
        own, rows, columns = (kernel.new_sums(images, x) for images in (6, 6, 70))
        kernel.add_own(x, own)
        kernel.add_block(x, y, rows, columns)
        gradients = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(y)
        kernel.own_gradient(x, w_x, gradients[0])
        kernel.block_gradient(x, y, w_x, w_y, *gradients[1:])
        results.append((*own, *rows, *columns, *gradients))
    _assert_same(*results, equal_nan=True)
    own = RowSums(*results[0][:3])
    for numbers in (*own.totals, own.hardest):
        assert numbers[0, 3].isnan()
    # Its positive is the only one of the other view that does not meet it.
    assert own.totals[1, 1].isnan().tolist() == [True, True, True, False, True, True]


def test_nan_spreads_to_all_that_meet_it_and_to_nothing_else(interpreted):
    interpreted(check_nan)


def check_loss(device: str, temperature: float) -> None:
    views = torch.randn(2, 70, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    z = torch.cat([views[0], views[0] + 0.5 * views[1]])
    exact, single = z.clone().requires_grad_(), z.float().requires_grad_()
    expected = reference.nt_xent(exact, temperature)
    expected.backward()
    result = production.distributed_nt_xent(single, temperature, kernel="triton")
    result.loss.backward()
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-5, atol=1e-7)
    assert float((single.grad.double() - exact.grad).norm() / exact.grad.norm()) < 2e-5
    plain = production.distributed_nt_xent(z, temperature)
    for name in ("accuracy", "entropy", "positive_similarity", "negative_similarity"):
        torch.testing.assert_close(getattr(result, name).double(), getattr(plain, name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.015])
def test_loss_and_gradient_are_those_of_the_reference(interpreted, temperature):
    interpreted(check_loss, temperature)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_all_of_it_on_a_gpu():
    for case in [*OWN.values(), (3000, 128, 512), (300, 512, 512)]:
        check_own("cuda", *case)
    for case in [*BLOCKS, (1000, 3000, 128, "ring"), (300, 700, 500, "slice")]:
        for mirrored in (False, True):
            check_block("cuda", *case, mirrored, ALL_QUADRANTS)
            check_block("cuda", *case, mirrored, SOME_QUADRANTS)
    check_nan("cuda")
    for temperature in (0.5, 0.1, 0.015):
        check_loss("cuda", temperature)


def test_a_temperature_that_needs_a_running_maximum_is_refused():
    from simclr_ray.learn.triton_tiles import TritonTiles

    with pytest.raises(AssertionError, match=r"temperature 0\.01 needs.*use TorchTiles"):
        TritonTiles(0.01)


class _Device:
    """Stands for Triton's driver: a GPU that can be compiled for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 1000 + self.capability  # Triton remembers its target by this

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


class _Compiled:
    """Stands for a kernel: takes its launches, and compiles what they would run."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.binaries = kernel, {}

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            binary = self.kernel.warmup(*args, grid=grid, **options)
            self.binaries[binary.hash] = binary

        return launch


@pytest.mark.parametrize(
    ("capability", "shared_memory", "dim", "precision"),
    [
        pytest.param(90, 227 << 10, 128, "ieee", id="H100"),
        pytest.param(90, 227 << 10, 128, "tf32x3", id="H100, tensor cores"),
        pytest.param(86, 99 << 10, 500, "ieee", id="A10, D no multiple of 16"),
    ],
)
def test_what_is_launched_compiles_for_a_gpu(tmp_path, monkeypatch, capability, shared_memory, dim, precision):
    import triton

    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas").exists():
        pytest.skip("this triton comes without ptxas")
    if not hasattr(triton.runtime.driver, "_active"):
        pytest.skip("this triton does not let its driver be replaced")
    from simclr_ray.learn import triton_tiles

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", _Device(capability))
    sums_kernel, gradient_kernel = _Compiled(triton_tiles._sums_kernel), _Compiled(triton_tiles._gradient_kernel)
    monkeypatch.setattr(triton_tiles, "_sums_kernel", sums_kernel)
    monkeypatch.setattr(triton_tiles, "_gradient_kernel", gradient_kernel)
    kernel = triton_tiles.TritonTiles(TEMPERATURE, input_precision=precision)
    for images in (1, 32):
        z, w = _unit(images, dim, "cpu", 0), _normalizer(images, "cpu", 0)
        sums = kernel.new_sums(images, z)
        kernel.add_own(z, sums)
        kernel.add_block(z, z, sums, None)
        kernel.own_gradient(z, w, torch.zeros_like(z))
        kernel.block_gradient(z, z, w, w, torch.zeros_like(z), None)
    # Of either kernel, with and without the diagonal, of the sums also within and across views; whatever the sizes.
    assert (len(sums_kernel.binaries), len(gradient_kernel.binaries)) == (4, 2)
    for binary in (*sums_kernel.binaries.values(), *gradient_kernel.binaries.values()):
        assert binary.asm["cubin"].startswith(b"\x7fELF")
        assert binary.metadata.shared <= shared_memory
