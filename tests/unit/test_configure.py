"""Every mistake is reported at once, with its full path and the nearest key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from simclr_ray.config import Config
from simclr_ray.configure import all_keys, flat, load_config, schema, to_yaml
from simclr_ray.errors import ConfigError


def message(source: object = None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)  # type: ignore[arg-type]
    return str(caught.value)


def test_all_mistakes_are_listed_at_once_with_their_full_path() -> None:
    text = message(
        {"loss": {"temprature": 0.1}, "train": {"global_batch": "many"}}, "loss.temperature=0", "run.seed=-1"
    )
    assert "4 mistakes" in text
    assert "loss.temprature: unknown key (did you mean loss.temperature?)" in text
    assert "train.global_batch: got 'many', expected a valid integer" in text
    assert "loss.temperature: got 0, expected greater than 0" in text
    assert "run.seed: got -1" in text
    assert "pydantic" not in text


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("data.global_batch=8", "train.global_batch"),
        ("batch_size=8", "train.global_batch"),
        ("optim.lr=1", "optim.base_learning_rate"),
        ("train.epoch=8", "train.epochs"),
        ("los.temperature=1", "loss"),
    ],
)
def test_a_wrong_key_is_answered_with_the_right_one(override: str, meant: str) -> None:
    assert f"(did you mean {meant}?)" in message(None, override)


@pytest.mark.parametrize("value", ["0", "-1", ".nan", ".inf", '"0,1"', "0,1"])
def test_a_temperature_that_cannot_work_is_refused(value: str) -> None:
    assert "loss.temperature: got" in message(None, f"loss.temperature={value}")


def test_steps_and_epochs_together_are_refused() -> None:
    assert "train.epochs, train.steps" in message({"train": {"epochs": 1, "steps": 5}})


def test_numbers_that_yaml_reads_as_text_still_count() -> None:
    assert load_config(None, ["optim.base_learning_rate=1e-3"]).optim.base_learning_rate == 1e-3


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("train: {global_batch: 128, epochs: 3}\n")
    config = load_config(file, ["train.global_batch=64"])
    assert (config.train.global_batch, config.train.epochs) == (64, 3)


@pytest.mark.parametrize(
    "text",
    ["[1, 2]", "a: [", "!!python/object/apply:os.system ['true']", "loss: 3"],
    ids=["list", "torn", "code", "scalar"],
)
def test_a_file_that_is_no_config_is_a_sentence(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert "Traceback" not in message(file)


def test_an_absent_file_is_a_sentence(tmp_path: Path) -> None:
    assert "not found" in message(tmp_path / "none.yaml")


@given(st.floats(0.01, 10), st.integers(2, 10**6), st.sampled_from(["lars", "adamw"]))
def test_config_to_yaml_to_config_is_identity(temperature: float, batch: int, name: str) -> None:
    config = load_config(
        {"loss": {"temperature": temperature}, "train": {"global_batch": batch}, "optim": {"name": name}}
    )
    assert load_config(yaml.safe_load(to_yaml(config.model_dump(mode="json")))) == config


def test_every_key_has_a_description_and_no_bare_batch_size_exists() -> None:
    assert not [key for key in all_keys() if "batch_size" in key]
    for section in [Config, *(f.annotation for f in Config.model_fields.values())]:
        assert [n for n, f in section.model_fields.items() if not f.description] == []  # type: ignore[union-attr]
    assert set(flat(Config().model_dump())) == {k for k in all_keys() if "." in k}
    assert schema()["properties"]["loss"]


def test_the_recipes_load() -> None:
    recipes = sorted(Path(__file__).parents[2].glob("jobs/*.yaml"))
    assert len(recipes) >= 3
    for recipe in recipes:
        load_config(recipe)
