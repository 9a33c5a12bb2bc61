"""Public weights: the layouts that are documented, on files made here, with the arithmetic of where they come from."""

from __future__ import annotations

import itertools
import os
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file

from simclr_ray import import_weights, load_encoder
from simclr_ray.data.manifest import Manifest
from simclr_ray.errors import ConfigError, DataError, StorageError
from simclr_ray.publish.export import export
from simclr_ray.publish.tensor_bundle import open_bundle
from tests.conftest import make_data_set, real_rows

Arrays = dict[str, np.ndarray]


def torchvision_encoder(name: str = "resnet18") -> torch.nn.Module:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize(
    ("wrapped", "prefix", "heads"),
    [
        ("state_dict", "", {"fc.weight": (10, 512)}),
        ("", "", {}),
        ("state_dict", "module.backbone.", {"projection_head.0.weight": (3, 3), "module.fc.bias": (3,)}),
        ("model", "encoder_q.", {"encoder_q.fc.0.weight": (4, 4), "queue": (5, 5)}),
    ],
)
@pytest.mark.parametrize("safetensors", [False, True])
def test_torchvision_names_under_usual_prefixes(
    tmp_path: Path, wrapped: str, prefix: str, heads: dict[str, tuple[int, ...]], safetensors: bool
) -> None:
    source = torchvision_encoder()
    source.fc = torch.nn.Identity()
    tensors = {prefix + name: value for name, value in source.state_dict().items()}
    tensors |= {name: torch.zeros(shape) for name, shape in heads.items()}
    if safetensors:
        save_file(tensors, tmp_path / "weights")
    else:
        torch.save({wrapped: tensors, "epoch": 3} if wrapped else tensors, tmp_path / "weights")
    report = import_weights(str(tmp_path / "weights"), str(tmp_path / "run"), layout="pytorch", size=64)
    assert set(report.left_out) == set(heads)
    assert (report.encoder, report.projector) == ("resnet18 1x, stem imagenet", False)
    trained = load_encoder(str(tmp_path / "run"))
    images = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(trained.model.encoder(images), source(images))


def test_an_imported_encoder_is_exported_but_has_no_projector(tmp_path: Path) -> None:
    torch.save(torchvision_encoder().state_dict(), tmp_path / "weights")
    import_weights(str(tmp_path / "weights"), str(tmp_path / "run"), layout="pytorch", size=32)
    export(str(tmp_path / "run"), str(tmp_path / "out"), format="torchvision")
    assert "imported" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ConfigError, match="without a projector"):
        export(str(tmp_path / "run"), str(tmp_path / "other"), projector=True)


class Bomb:
    """Unpickled, it would make a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_would_run_code_is_refused(tmp_path: Path, legacy: bool) -> None:
    probe, place = tmp_path / "probe", tmp_path / "weights"
    if legacy:
        place.write_bytes(pickle.dumps({"state_dict": Bomb(str(probe))}))
    else:
        torch.save({"state_dict": Bomb(str(probe))}, place)
    with pytest.raises(DataError, match="never loaded"):
        import_weights(str(place), str(tmp_path / "run"), layout="pytorch")
    assert not probe.exists()
    assert not (tmp_path / "run").exists()
    kernel = "model/resnet_model/initial_conv_relu_max_pool/0/conv2d/kernel"
    np.savez(tmp_path / "weights.npz", **{kernel: np.array([Bomb(str(probe))], dtype=object)})
    with pytest.raises(DataError, match=r"not an \.npz of arrays"):
        import_weights(str(tmp_path / "weights.npz"), str(tmp_path / "run"), layout="tf2")
    assert not probe.exists()


def test_what_does_not_fit_is_a_sentence(tmp_path: Path) -> None:
    place, run = tmp_path / "weights", str(tmp_path / "run")
    for tensors, words in (
        ({"a": torch.zeros(2)}, "no ResNet"),
        ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "an encoder that this project has not"),
        (torchvision.models.resnet34().state_dict(), "an encoder that this project has not"),
        (torchvision.models.wide_resnet50_2().state_dict(), "do not fit resnet50"),
        ({name: value for name, value in torchvision_encoder().state_dict().items() if name != "bn1.weight"}, "bn1"),
        ({}, "no state dict"),
    ):
        torch.save(tensors, place)
        with pytest.raises(DataError, match=words):
            import_weights(str(place), run, layout="pytorch")
    place.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(DataError, match="tensors alone"):
        import_weights(str(place), run, layout="pytorch")
    with pytest.raises(StorageError, match="no file here"):
        import_weights(str(tmp_path / "absent"), run, layout="pytorch")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter").write_text("dear")
    with pytest.raises(ConfigError, match="not empty"):
        import_weights(str(place), str(tmp_path / "full"), layout="pytorch")


# google-research/simclr, tf2: variables by object name, and what its layers compute with them.

LAYERS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}


def tf2_variables(depth: int, *, width: int = 1, cifar: bool = False, head: tuple[int, ...] = ()) -> Arrays:
    rng = np.random.default_rng(depth)
    made: Arrays = {}

    def convolution(name: str, kernel: int, inputs: int, outputs: int) -> None:
        scale = (1 / (kernel * kernel * inputs)) ** 0.5
        shape = (kernel, kernel, inputs, outputs)
        made[f"{name}/conv2d/kernel"] = rng.normal(0, scale, shape).astype(np.float32)

    def batch_norm(name: str, channels: int, *, beta: bool = True) -> None:
        made[f"{name}/gamma"] = rng.uniform(0.5, 1.5, channels).astype(np.float32)
        made[f"{name}/moving_mean"] = rng.normal(0, 0.1, channels).astype(np.float32)
        made[f"{name}/moving_variance"] = rng.uniform(0.5, 1.5, channels).astype(np.float32)
        if beta:
            made[f"{name}/beta"] = rng.normal(0, 0.1, channels).astype(np.float32)

    root = "model/resnet_model"
    convolution(f"{root}/initial_conv_relu_max_pool/0", 3 if cifar else 7, 3, 64 * width)
    batch_norm(f"{root}/initial_conv_relu_max_pool/2/bn", 64 * width)
    channels = 64 * width
    for group, blocks in enumerate(LAYERS[depth]):
        filters = 64 * width * 2**group
        outputs = filters * (4 if depth == 50 else 1)
        for block in range(blocks):
            place = f"{root}/block_groups/{group}/layers/{block}"
            if block == 0:
                shortcut = "projection_layers" if depth == 50 else "shortcut_layers"
                convolution(f"{place}/{shortcut}/0", 1, channels, outputs)
                batch_norm(f"{place}/{shortcut}/1/bn", outputs)
            if depth == 50:
                body, plan = "conv_relu_dropblock_layers", ((0, 1, channels, filters), (3, 3, filters, filters),
                                                            (6, 1, filters, outputs))  # fmt: skip
            else:
                body, plan = "conv2d_bn_layers", ((0, 3, channels, filters), (2, 3, filters, filters))
            for at, kernel, inputs, filters_out in plan:
                convolution(f"{place}/{body}/{at}", kernel, inputs, filters_out)
                batch_norm(f"{place}/{body}/{at + 1}/bn", filters_out)
            channels = outputs
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(head)):
        place = f"model/_projection_head/linear_layers/{layer}"
        made[f"{place}/dense/kernel"] = rng.normal(0, 0.1, (inputs, outputs)).astype(np.float32)
        batch_norm(f"{place}/bn_relu/bn", outputs, beta=layer < len(head) - 2)
    made["model/supervised_head/linear_layer/dense/kernel"] = np.zeros((channels, 10), np.float32)
    return {f"{name}/.ATTRIBUTES/VARIABLE_VALUE": value for name, value in made.items()}


def tf2_forward(variables: Arrays, images: torch.Tensor, depth: int, *, cifar: bool) -> torch.Tensor:
    """What tf2/resnet.py computes in evaluation mode, written with its paddings spelled out."""
    stored = {name.removesuffix("/.ATTRIBUTES/VARIABLE_VALUE"): torch.from_numpy(v) for name, v in variables.items()}

    def same(x: torch.Tensor, kernel: int, stride: int, value: float) -> torch.Tensor:
        pads = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in (x.shape[3], x.shape[2])]
        return F.pad(x, [pads[0] // 2, pads[0] - pads[0] // 2, pads[1] // 2, pads[1] - pads[1] // 2], value=value)

    def convolution(x: torch.Tensor, name: str, stride: int) -> torch.Tensor:
        kernel = stored[f"{name}/conv2d/kernel"].permute(3, 2, 0, 1)
        size = kernel.shape[-1]
        if stride > 1:  # FixedPadding, then VALID
            before = (size - 1) // 2
            x = F.pad(x, [before, size - 1 - before] * 2)
        else:
            x = same(x, size, 1, 0.0)
        return F.conv2d(x, kernel, stride=stride)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        gamma, beta, mean, variance = (
            stored[f"{name}/bn/{part}"].view(1, -1, 1, 1)
            for part in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        return (x - mean) / torch.sqrt(variance + 1e-5) * gamma + beta

    root = "model/resnet_model"
    x = convolution(images, f"{root}/initial_conv_relu_max_pool/0", 1 if cifar else 2)
    x = norm(x, f"{root}/initial_conv_relu_max_pool/2").relu()
    if not cifar:
        x = F.max_pool2d(same(x, 3, 2, -np.inf), 3, 2)
    for group, blocks in enumerate(LAYERS[depth]):
        for block in range(blocks):
            place = f"{root}/block_groups/{group}/layers/{block}"
            stride = 2 if group and not block else 1
            shortcut = x
            if block == 0:
                name = f"{place}/{'projection_layers' if depth == 50 else 'shortcut_layers'}"
                shortcut = norm(convolution(x, f"{name}/0", stride), f"{name}/1")
            if depth == 50:
                name = f"{place}/conv_relu_dropblock_layers"
                x = norm(convolution(x, f"{name}/0", 1), f"{name}/1").relu()
                x = norm(convolution(x, f"{name}/3", stride), f"{name}/4").relu()
                x = norm(convolution(x, f"{name}/6", 1), f"{name}/7")
            else:
                name = f"{place}/conv2d_bn_layers"
                x = norm(convolution(x, f"{name}/0", stride), f"{name}/1").relu()
                x = norm(convolution(x, f"{name}/2", 1), f"{name}/3")
            x = (x + shortcut).relu()
    return x.mean(dim=(2, 3))


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def block_of(entries: list[tuple[bytes, bytes]]) -> bytes:
    out, restarts, last = bytearray(), [0], b""
    for i, (key, value) in enumerate(entries):
        if i % 16 == 0 and i:
            restarts.append(len(out))
            last = b""
        shared = next((j for j, (a, b) in enumerate(zip(key, last, strict=False)) if a != b), min(len(key), len(last)))
        shared = shared if i % 16 else 0
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    return bytes(out) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def write_bundle(prefix: Path, arrays: Mapping[str, np.ndarray], *, per_block: int = 20) -> None:
    """As TensorFlow's BundleWriter does it: sorted keys in blocks, an index of blocks, the data in one file."""
    data, entries = bytearray(), [(b"", field(1, 1) + field(3, field(1, 1)))]
    numbers = {np.dtype("f4"): 1, np.dtype("i8"): 9}
    entries.append((b"_CHECKPOINTABLE_OBJECT_GRAPH", field(1, 7) + field(2, b"") + field(5, 3)))
    data += b"abc"
    for name, value in sorted(arrays.items()):
        shape = b"".join(field(2, field(1, size)) for size in value.shape)
        raw = value.tobytes()
        entry = field(1, numbers[value.dtype]) + field(2, shape) + field(4, len(data)) + field(5, len(raw))
        entries.append((name.encode(), entry + varint(6 << 3 | 5) + b"\0\0\0\0"))
        data += raw
    entries.sort()
    table, index = bytearray(), []
    for start in range(0, len(entries), per_block):
        chosen = entries[start : start + per_block]
        block = block_of(chosen)
        index.append((chosen[-1][0], varint(len(table)) + varint(len(block))))
        table += block + b"\0\0\0\0\0"
    handles = []
    for block in (block_of([]), block_of(index)):
        handles.append(varint(len(table)) + varint(len(block)))
        table += block + b"\0\0\0\0\0"
    footer = b"".join(handles).ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    Path(f"{prefix}.index").write_bytes(bytes(table) + footer)
    Path(f"{prefix}.data-00000-of-00001").write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("depth", "cifar", "size"),
    [(50, False, 64), (50, False, 66), pytest.param(50, True, 32, marks=pytest.mark.slow)],
)
def test_a_tf2_checkpoint_gives_tensorflows_numbers(tmp_path: Path, depth: int, cifar: bool, size: int) -> None:
    """Sizes of which the stem gives an even and an odd map: max pooling pads otherwise in each."""
    width = 512 if depth == 18 else 2048
    variables = tf2_variables(depth, cifar=cifar, head=(width, 64, 16))
    write_bundle(tmp_path / "ckpt-3", variables | {"global_step/.ATTRIBUTES/VARIABLE_VALUE": np.array(7)})
    report = import_weights(str(tmp_path / "ckpt-3.index"), str(tmp_path / "run"), layout="tf2", size=size)
    assert report.encoder == f"resnet{depth} 1x, stem {'cifar' if cifar else 'imagenet-same'}"
    assert report.projector
    assert list(report.left_out) == ["model/supervised_head/linear_layer/dense/kernel"]
    trained = load_encoder(str(tmp_path / "run"))
    assert (trained.policy.size, trained.policy.mean, trained.policy.flavour) == (size, None, "paper")
    images = torch.rand(2, 3, size, size)
    with torch.inference_mode():
        h = trained.model.encoder(images)
        expected = tf2_forward(variables, images, depth, cifar=cifar)
        torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(trained.model.projector(h), tf2_head(variables, h), rtol=1e-4, atol=1e-4)


def tf2_head(variables: Arrays, h: torch.Tensor) -> torch.Tensor:
    stored = {name.removesuffix("/.ATTRIBUTES/VARIABLE_VALUE"): torch.from_numpy(v) for name, v in variables.items()}
    for layer in (0, 1):
        place = f"model/_projection_head/linear_layers/{layer}"
        h = h @ stored[f"{place}/dense/kernel"]
        norm = f"{place}/bn_relu/bn"
        h = (h - stored[f"{norm}/moving_mean"]) / torch.sqrt(stored[f"{norm}/moving_variance"] + 1e-5)
        h = h * stored[f"{norm}/gamma"] + stored.get(f"{norm}/beta", torch.zeros(()))
        h = h.relu() if layer == 0 else h
    return h


def test_an_npz_of_the_same_names_is_the_same(tmp_path: Path) -> None:
    variables = tf2_variables(50)
    np.savez(tmp_path / "weights.npz", **variables)
    write_bundle(tmp_path / "ckpt", variables)
    for name, file in (("a", "weights.npz"), ("b", "ckpt.index")):
        import_weights(str(tmp_path / file), str(tmp_path / name), layout="tf2")
    one, other = (load_encoder(str(tmp_path / name)).model.encoder.state_dict() for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_tf2_weights_that_we_have_no_network_for_are_refused(tmp_path: Path) -> None:
    variables = tf2_variables(18)
    selective = variables | {"model/resnet_model/initial_conv_relu_max_pool/1/bn/gamma": np.ones(3, np.float32)}
    for arrays, words in (
        (selective, "selective kernels"),
        (variables, "ResNet-18 of Google's code"),
        (variables | {"model/resnet_model/extra/kernel": np.ones(3, np.float32)}, "parts of the encoder are not known"),
        ({"x": np.ones(3, np.float32)}, "no encoder of google-research"),
    ):
        np.savez(tmp_path / "weights.npz", **arrays)
        with pytest.raises(DataError, match=words):
            import_weights(str(tmp_path / "weights.npz"), str(tmp_path / "run"), layout="tf2")


@pytest.mark.parametrize("lost", ["linear_layers/0/dense/kernel", "linear_layers/1/dense/kernel"])
def test_a_projection_head_that_lacks_a_layer_is_refused(tmp_path: Path, lost: str) -> None:
    variables = tf2_variables(50, head=(2048, 64, 16))
    np.savez(tmp_path / "weights.npz", **{name: value for name, value in variables.items() if lost not in name})
    with pytest.raises(DataError, match="projection head is not one of"):
        import_weights(str(tmp_path / "weights.npz"), str(tmp_path / "run"), layout="tf2")


def test_a_broken_checkpoint_is_a_sentence_wherever_it_is_cut_or_flipped(tmp_path: Path) -> None:
    write_bundle(
        tmp_path / "ckpt", {"a/b": np.arange(6, dtype=np.float32).reshape(2, 3), "a/c": np.ones(2, np.float32)}
    )
    bundle = open_bundle(str(tmp_path / "ckpt.index"))
    assert bundle.names() == ["a/b", "a/c"]
    assert bundle.read("a/b").tolist() == [[0, 1, 2], [3, 4, 5]]
    data = (tmp_path / "ckpt.index").read_bytes()
    rng = np.random.default_rng(0)
    for at in range(len(data)):
        for damaged in (data[:at], data[:at] + bytes([data[at] ^ int(rng.integers(1, 256))]) + data[at + 1 :]):
            (tmp_path / "ckpt.index").write_bytes(damaged)
            try:
                broken = open_bundle(str(tmp_path / "ckpt.index"))
                for name in broken.names():
                    broken.read(name)
            except DataError:
                pass
    (tmp_path / "ckpt.index").write_bytes(data)
    (tmp_path / "ckpt.data-00000-of-00001").unlink()
    with pytest.raises(DataError, match="data of tensor 'a/b' is missing"):
        open_bundle(str(tmp_path / "ckpt.index")).read("a/b")


def test_evaluate_takes_an_imported_encoder(tmp_path: Path) -> None:
    from simclr_ray.evaluate.evaluate import evaluate

    torch.save(torchvision_encoder().state_dict(), tmp_path / "weights")
    import_weights(str(tmp_path / "weights"), str(tmp_path / "run"), layout="pytorch", size=16)
    data: Manifest = make_data_set(tmp_path / "data", real_rows(120))
    result = evaluate(
        str(tmp_path / "run"),
        [f"evaluate.train={data.folder}", f"evaluate.test={data.folder}", "evaluate.num_labels=50"],
    )
    assert result.step == 0
    assert (tmp_path / "run" / "eval" / "results.json").exists()
