"""The block for bug reports: what a machine is, and none of its secrets."""

from __future__ import annotations

import pytest

from simclr_ray.cli import main
from simclr_ray.publish.environment import environment_block, masked
from simclr_ray.storage.redaction import GONE

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "AWS_SESSION_TOKEN": "IQoJb3JpZ2luX2VjEPLANTEDplantedPLANTED0123",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN": "short-pw",
    "RAY_AUTH_TOKEN": "planted-ray-token",
    "RAY_REDIS_PASSWORD": "planted-redis",
    "HTTPS_PROXY": "http://someone:planted-proxy-pw@proxy.example:3128",
    "HTTP_PROXY": "http://planted-token@proxy.example:3128",
    "RAY_external_storage": "redis://:planted-cache-pw@cache.example:6379",
    "AWS_ENDPOINT_URL": "https://store.example/?X-Amz-Signature=0123456789abcdefplanted",
}


def test_planted_secrets_are_not_in_the_block() -> None:
    block = environment_block(SECRETS | {"HF_TOKEN": "hf_planted", "MY_OWN_THING": "private"})
    for name in SECRETS:
        assert name in block
    for secret in ("AKIA", "wJalr", "IQoJ", "planted", "short-pw"):
        assert secret not in block, block
    assert "proxy.example:3128" in block  # where requests go is what a bug report needs
    assert "MY_OWN_THING" not in block
    assert "HF_TOKEN" not in block


@pytest.mark.parametrize("name", ["aws_secret_access_key", "RAY_AUTH_TOKEN", "SIMCLR_API_KEY", "TORCH_PASSWORD"])
def test_a_credential_is_known_by_its_name(name: str) -> None:
    assert masked(name, "x") == GONE
    assert masked(name, "") == "(empty)"


def test_a_value_cannot_forge_a_line() -> None:
    block = environment_block({"RAY_A": "x\nAWS_PROFILE  forged\x1b[2J"})
    assert "\nAWS_PROFILE" not in block
    assert "\x1b" not in block


def test_the_command_names_versions_and_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    for name in ("simclr-ray", "python", "torch", "ray", "cores", "views"):
        assert f"\n{name} " in "\n" + out
