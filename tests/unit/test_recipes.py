"""The recipes of `jobs/`: each loads, fits a data set of the size it is made for, and has the paper's numbers."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from simclr_ray.configure import load_config, require_places
from simclr_ray.data.manifest import UNIT_ROWS, Manifest, Shard
from simclr_ray.train.build import build_model
from simclr_ray.train.derive import derive, policy_of, sentences

JOBS = Path(__file__).parents[2] / "jobs"
IMAGENET = 1_281_167


@dataclass(frozen=True)
class Recipe:
    """What a recipe must come to."""

    images: int
    steps: tuple[int, int]
    """At least and at most."""
    peak: float
    parameters_m: float
    """Of the encoder, in millions."""
    size: int = 224


RECIPES = {
    "smoke.yaml": Recipe(16_384, (32, 32), 2e-3, 0.3, 28),
    "fashion_mnist.yaml": Recipe(16_384, (896, 896), 4e-3, 0.3, 28),
    # Google's README: learning rate 1.0 * 512 / 256; about 91 % linear
    "cifar10_resnet18.yaml": Recipe(50_000, (97_500, 97_700), 2.0, 11.2, 32),
    # SimCLR B.1: 0.075 * sqrt(4096) = 4.8; a ResNet-50 has 23.5 M parameters without its classifier
    "imagenet_resnet50.yaml": Recipe(IMAGENET, (31_200, 31_300), 4.8, 23.5),
    "imagenet_resnet50_1000.yaml": Recipe(IMAGENET, (312_000, 313_000), 4.8, 23.5),
    # SimCLR, table 1 of the appendix: 2x has 94 M
    "webscale_resnet50x2.yaml": Recipe(1_000_000_000, (312_000, 313_000), 4.8, 94.0),
}


def synthetic(images: int, folder: str) -> Manifest:
    """Shards of 128 units that do not exist; the last has the rest."""
    full, rest = divmod(images, 128 * UNIT_ROWS)
    groups = [(UNIT_ROWS,) * 128] * full + ([(UNIT_ROWS,) * (rest // UNIT_ROWS) + (rest % UNIT_ROWS,)] if rest else [])
    shards = [Shard(f"{index:06d}.parquet", "parquet", f"{index}", 1 << 28, rows) for index, rows in enumerate(groups)]
    return Manifest(folder, tuple(shards))


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_loads_and_derives_the_numbers_it_is_known_by(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    manifest = synthetic(min(recipe.images, 10_000_000), str(tmp_path / "data"))
    config = load_config(JOBS / name, [f"run.folder={tmp_path}/run", f"data.train={tmp_path}/data"])
    require_places(config)
    if recipe.images > 10_000_000:  # what is asked of the arithmetic does not need a manifest of a billion
        factor = recipe.images / manifest.rows
        config = load_config(config, [f"train.epochs={config.train.epochs * factor}",  # type: ignore[operator]
                                      f"optim.warmup_epochs={config.optim.warmup_epochs * factor}"])  # fmt: skip
    derived = derive(config, manifest)
    assert recipe.steps[0] <= derived.total_steps <= recipe.steps[1], derived
    assert derived.peak_learning_rate == pytest.approx(recipe.peak)
    assert 0 < derived.warmup_steps < derived.total_steps / 5
    assert policy_of(config.views).size == recipe.size
    assert len(sentences(config, derived)) >= 4


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipes_network_is_the_one_it_names(name: str) -> None:
    with torch.device("meta"):
        model = build_model(load_config(JOBS / name))
    parameters = sum(parameter.numel() for parameter in model.encoder.parameters()) / 1e6
    assert parameters == pytest.approx(RECIPES[name].parameters_m, rel=0.03)


@pytest.mark.parametrize("name", ["imagenet_resnet50.yaml", "imagenet_resnet50_1000.yaml", "webscale_resnet50x2.yaml"])
def test_simclrs_constants(name: str) -> None:
    """SimCLR, section 2.2 and B.1: LARS, weight decay 1e-6, temperature 0.1, 4096 images, two layers, 128 numbers."""
    config = load_config(JOBS / name)
    assert (config.optim.name, config.optim.weight_decay, config.optim.momentum) == ("lars", 1e-6, 0.9)
    assert (config.loss.temperature, config.train.global_batch) == (0.1, 4096)
    assert (config.model.projector_layers, config.model.projection_dim) == (2, 128)
    assert (config.views.strength, policy_of(config.views).crop_scale[0]) == (None, 0.08)
    warmup_images = config.optim.warmup_epochs * RECIPES[name].images
    assert warmup_images == pytest.approx(10 * IMAGENET, rel=0.01)  # ten epochs of ImageNet


@pytest.mark.parametrize("name", ["pretrain.py", "evaluate.py", "embed.py"])
def test_an_entrypoint_calls_the_verb_of_its_name(name: str) -> None:
    tree = ast.parse((JOBS / name).read_text())
    words = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert name.removesuffix(".py") in words
