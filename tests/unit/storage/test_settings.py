"""Settings travel as environment variables, hold no secret, and are taken back without a trace."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simclr_ray import storage
from simclr_ray.cli import main
from simclr_ray.config import Config
from simclr_ray.configure import load_config, schema, use_storage
from simclr_ray.errors import ConfigError
from simclr_ray.storage.settings import VARIABLE, from_text, to_text
from simclr_ray.train.run import identity

SETTINGS = st.builds(
    storage.StorageSettings,
    endpoint=st.none() | st.sampled_from(["http://127.0.0.1:9000", "https://s3.example.org"]),
    region=st.none() | st.sampled_from(["eu-central-1", "us-west-2"]),
    path_style=st.none() | st.booleans(),
    anonymous=st.booleans(),
    allow_http=st.booleans(),
    deadline_s=st.floats(0.1, 1000),
    connect_timeout_s=st.floats(0.1, 100),
    read_timeout_s=st.floats(0.1, 100),
)

Configure = Callable[[storage.StorageSettings], None]


@pytest.fixture(autouse=True)
def same_environment_after() -> Iterator[None]:
    before = dict(os.environ)
    yield
    storage.configure(storage.StorageSettings())
    assert {name for name in os.environ if name.startswith(("AWS", "SIMCLR"))} == {
        name for name in before if name.startswith(("AWS", "SIMCLR"))
    }


@given(SETTINGS)
def test_text_and_back_is_identity(settings: storage.StorageSettings) -> None:
    assert from_text(to_text(settings)) == settings
    assert pickle.loads(pickle.dumps(settings)) == settings


@given(SETTINGS)
def test_another_process_sees_the_same_from_the_environment(settings: storage.StorageSettings) -> None:
    carried = storage.environment(settings, given={})
    assert from_text(carried.get(VARIABLE, "")) == settings
    assert carried.get("AWS_ENDPOINT_URL_S3") == settings.endpoint
    assert carried.get("AWS_REGION") == carried.get("AWS_DEFAULT_REGION") == settings.region


def test_a_real_process_does(configure: Configure) -> None:
    settings = storage.StorageSettings(endpoint="http://127.0.0.1:9", region="eu-west-1", deadline_s=3.5)
    program = "from simclr_ray import storage; print(repr(storage.current()))"
    configure(settings)
    told = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert told.stdout.strip() == repr(settings)


def test_configuring_again_begins_from_the_environment_of_before(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    monkeypatch.delenv("AWS_REGION", raising=False)
    configure(storage.StorageSettings(endpoint="http://127.0.0.1:2", region="r"))
    assert (os.environ["AWS_ENDPOINT_URL_S3"], os.environ["AWS_REGION"]) == ("http://127.0.0.1:2", "r")
    configure(storage.StorageSettings(deadline_s=1))
    assert os.environ["AWS_ENDPOINT_URL_S3"] == "http://127.0.0.1:1"
    assert "AWS_REGION" not in os.environ
    configure(storage.StorageSettings())
    assert VARIABLE not in os.environ
    monkeypatch.undo()


def test_what_travels_is_no_secret() -> None:
    given_ = {
        "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "planted-1",
        "AWS_SESSION_TOKEN": "planted-2",
        "AWS_ENDPOINT_URL": "http://me:planted-3@127.0.0.1:9",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        "PLANTED": "planted-4",
    }
    carried = storage.environment(storage.StorageSettings(), given_)
    assert carried == {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9", "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required"}


@pytest.mark.parametrize(
    ("endpoint", "why"),
    [
        ("http://me:planted-word@h:9", "holds a user or a password"),
        ("127.0.0.1:9000", "is not an http or https URL"),
        ("ftp://h", "is not an http or https URL"),
        ("http://h/path", "holds more than"),
        ("http://169.254.169.254", "link-local"),
        ("http://[fe80::1]:80", "link-local"),
        ("http://h:port", "is not a URL"),
    ],
)
def test_an_endpoint_that_cannot_work_is_refused(endpoint: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        storage.StorageSettings(endpoint=endpoint)
    with pytest.raises(ConfigError) as caught:
        load_config({"storage": {"endpoint": endpoint}})
    assert why in str(caught.value)
    assert "planted-word" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        '{"deadline_s": "planted-word"}',
        '{"anonymous": 1}',
        '{"secret": "planted-word"}',
        '{"endpoint": 3}',
        "3",
    ],
)
def test_a_broken_variable_is_a_sentence(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_text(text)
    assert VARIABLE in str(caught.value)
    assert "planted-word" not in str(caught.value)


@pytest.mark.parametrize("key", ["access_key", "secret_key", "secret", "token", "password", "aws_session_token"])
@pytest.mark.parametrize("section", ["storage", "data"])
def test_the_configuration_refuses_credentials_without_showing_them(key: str, section: str) -> None:
    for given_ in (
        load_config_error({section: {key: "planted-word"}}),
        load_config_error({}, f"{section}.{key}=pl4nted"),
    ):
        assert f"{section}.{key} is no key: a configuration holds no credentials" in given_
        assert "planted-word" not in given_
        assert "pl4nted" not in given_


def load_config_error(values: dict[str, object], *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(values, overrides)
    return str(caught.value)


def test_a_secret_in_the_wrong_place_is_not_quoted() -> None:
    secret = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
    assert secret not in load_config_error({"storage": secret})
    assert secret not in load_config_error({}, f"storage.deadline_s={secret}")
    assert "planted-word" not in load_config_error({}, "password:planted-word")


def test_the_section_has_the_settings_fields_and_defaults() -> None:
    assert Config().storage.settings() == storage.StorageSettings()
    properties = schema()["$defs"]["StorageConfig"]["properties"]
    assert set(properties) == set(json.loads(json.dumps(storage.StorageSettings().__dict__)))
    assert all(one["description"] for one in properties.values())


def test_where_a_store_is_does_not_make_another_run() -> None:
    moved = load_config({}, ["storage.endpoint=http://127.0.0.1:9", "storage.deadline_s=5"])
    assert identity(moved, "f") == identity(Config(), "f")


def test_a_config_that_says_nothing_changes_nothing(configure: Configure) -> None:
    configure(storage.StorageSettings(deadline_s=7))
    use_storage(Config())
    assert storage.current().deadline_s == 7
    use_storage(load_config({}, ["storage.deadline_s=8"]))
    assert storage.current().deadline_s == 8


def test_verbs_without_a_configuration_take_storage_settings_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", "a", "b", "--set", "loss.temperature=1"]) == 2
    assert "only storage.* can be set here (got loss.temperature=1)" in capsys.readouterr().err
    assert main(["fetch-data", "emoji", "b", "--set", "storage.password=planted-word"]) == 2
    assert "planted-word" not in capsys.readouterr().err
