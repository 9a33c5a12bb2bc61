"""Planted secrets of every known shape are gone from text, and text without any stays as it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simclr_ray.storage import redact
from simclr_ray.storage.redaction import is_credential_name

KEY_ID = "AKIAIOSFODNN7EXAMPLE"
SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"  # AWS's own example
TOKEN = "IQoJb3JpZ2luX2VjEJr//////////wEaCXVzLWVhc3QtMSJHMEUCIQD" + "a1B2" * 40
OTHER = "hunter2-hunter2"

PLANTED = {
    "access key id": (f"user {KEY_ID} may not", KEY_ID),
    "temporary key id": ("ASIAY34FZKBOKMUTVV7A is unknown", "ASIAY34FZKBOKMUTVV7A"),
    "secret key alone": (f"got {SECRET} there", SECRET),
    "secret key in a file": (f"aws_secret_access_key = {SECRET}", SECRET),
    "secret in the environment's form": (f"AWS_SECRET_ACCESS_KEY={OTHER}", OTHER),
    "secret in JSON": (f'{{"secretKey": "{OTHER}", "a": 1}}', OTHER),
    "secret in Python": (f"{{'SecretAccessKey': '{OTHER}'}}", OTHER),
    "keyword": (f"connect(password='{OTHER}')", OTHER),
    "session token": (f"token {TOKEN} expired", TOKEN),
    "session token, keyed": (f"aws_session_token={OTHER}", OTHER),
    "signed URL": (f"https://b.s3.amazonaws.com/k?X-Amz-Signature={'ab12' * 16}&X-Amz-Expires=9", "ab12" * 16),
    "credential of a signed URL": ("?X-Amz-Credential=NOTASHAPE%2F2026%2Fus-east-1", "NOTASHAPE"),
    "token of a signed URL": (f"?X-Amz-Security-Token={OTHER}&x=1", OTHER),
    "old signed URL": (f"?AWSAccessKeyId=ABC&Signature={OTHER}%3D&Expires=1", OTHER),
    "Google's signed URL": (f"?X-Goog-Signature={OTHER}", OTHER),
    "Azure's signed URL": (f"?sv=2022&sig={OTHER}", OTHER),
    "Azure connection string": (f"AccountName=a;AccountKey={OTHER};x", OTHER),
    "user and password": (f"http://me:{OTHER}@127.0.0.1:9000/b", OTHER),
    "key and secret in a URI": (f"s3://{KEY_ID}:{SECRET}@bucket/k", SECRET),
    "signature header": (
        f"Authorization: AWS4-HMAC-SHA256 Credential={KEY_ID}/20260101/us-east-1/s3/aws4_request, Signature=beefbeef",
        "beefbeef",
    ),
    "bearer header": (f"'Authorization': 'Bearer {OTHER}'", OTHER),
    "bearer alone": (f"sent bearer {OTHER} to it", OTHER),
    "web identity": ("eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJzeXN0ZW0ifQ.c2lnbmF0dXJl", "eyJzdWIiOiJzeXN0ZW0ifQ"),
    "private key": ("-----BEGIN PRIVATE KEY-----\nMIIEvQIB\nADANBg\n-----END PRIVATE KEY-----\nrest", "MIIEvQIB"),
    "torn private key": ("-----BEGIN RSA PRIVATE KEY-----\nMIIEvQIB", "MIIEvQIB"),
    "S3's answer": ("<AWSAccessKeyId>whatever</AWSAccessKeyId><Code>x</Code>", "whatever"),
    "signature S3 answers": ("<SignatureProvided>c0ffee</SignatureProvided>", "c0ffee"),
    "hub token": ("hf_" + "aBcD" * 8, "aBcD" * 8),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_secret_is_gone(name: str) -> None:
    text, secret = PLANTED[name]
    assert secret in text
    for around in ("{}", "error: {}\n  at line 3", '"{}"', "({})", "[{}]"):
        assert secret not in redact(around.format(text))


def test_a_secret_of_no_shape_is_known_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "minio-secret-1")
    assert redact("the secret is minio-secret-1.") == "the secret is [redacted]."


def test_a_short_word_of_the_environment_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "read")
    assert redact("cannot be read") == "cannot be read"


@pytest.mark.parametrize(
    "text",
    [
        "s3://train/images/00017.parquet: cannot be read: the store answers SlowDown after 7 attempts in 120 s",
        "da39a3ee5e6b4b0d3255bfef95601890afd80709",  # a git or SHA-1 hash
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "/data/images/train/n01440764/n01440764_10026.JPEG",
        "http://127.0.0.1:9000/bucket/key",
        "http://127.0.0.1:9000/bucket/me@example.org",
        "loss.temperature: got 0, expected greater than 0",
        "tokens 12, signatures 3, password",
        "AKIA is the beginning of an access key",
    ],
)
def test_plain_text_stays(text: str) -> None:
    assert redact(text) == text


@given(st.lists(st.sampled_from([text for text, _ in PLANTED.values()]) | st.text(max_size=30), max_size=5))
def test_twice_is_once(parts: list[str]) -> None:
    once = redact(" ".join(parts))
    assert redact(once) == once


@given(st.text(st.characters(codec="ascii"), max_size=40), st.text(st.characters(codec="ascii"), max_size=40))
def test_a_key_id_never_gets_through(before: str, after: str) -> None:
    assert KEY_ID not in redact(f"{before} {KEY_ID} {after}")


@pytest.mark.parametrize(
    "name",
    ["access_key", "aws_secret_access_key", "secret", "token", "password", "session_token", "s3_secret_key", "key"],
)
def test_credential_names(name: str) -> None:
    assert is_credential_name(name)


@pytest.mark.parametrize("name", ["temprature", "region", "tokens_seen", "monkey", "keep_checkpoints", "signatures"])
def test_other_names(name: str) -> None:
    assert not is_credential_name(name)
