"""Taking keys out of text that people will read: messages, logs and whatever an error quotes.

Shapes that vendors document are recognised anywhere; a value is also taken out when it stands behind a name such as
`secret=`, and when it is one that this process's own environment holds. What is left is the sentence without them.
"""

from __future__ import annotations

import os
import re

GONE = "[redacted]"
_SECRET_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_CLIENT_SECRET",
    "HF_TOKEN",
    "WANDB_API_KEY",
)
_MIN_LENGTH = 8
"""Shorter values of the environment are left alone: they would be words of other sentences."""

_NAMES = (
    r"(?:aws[_-]?)?(?:secret[_-]?access[_-]?key|access[_-]?key[_-]?id|session[_-]?token|secret[_-]?key|access[_-]?key)"
    r"|secret|passw(?:or)?d|passphrase|pwd|token|api[_-]?key|account[_-]?key|sas[_-]?token|client[_-]?secret"
    r"|x-amz-(?:signature|credential|security-token)|x-goog-(?:signature|credential)|AWSAccessKeyId|signature|sig"
)
_SHAPES = (
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    # A user and password, or key and secret, in front of a host; a secret may hold slashes.
    re.compile(r"(?<=://)[^/\s:@]*:(?:[A-Za-z0-9/+=]{40}|[^/\s@]+)(?=@)"),
    re.compile(r"(?i)\b(?:bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}"),
    re.compile(r"(?i)\bauthorization['\"]?\s*[:=]\s*['\"]?[^\r\n'\"]+"),
    re.compile(r"\bAWS4-HMAC-SHA256\b[^\r\n]*"),
    # Name and value, as in a query, a header, a file, JSON or Python.
    re.compile(rf"(?i)(?P<keep>(?<![A-Za-z0-9])(?:{_NAMES})['\"]?\s*[=:]\s*['\"]?)(?!\[redacted)[^\s'\",;&<>]+"),
    re.compile(
        rf"(?i)(?P<keep><(?P<tag>{_NAMES}|AWSAccessKeyId|SignatureProvided|StringToSign(?:Bytes)?"
        r"|CanonicalRequest(?:Bytes)?)>)(?!\[redacted).*?(?=</)",
        re.DOTALL,
    ),
    re.compile(r"\b(?:AKIA|ASIA|ABIA|ACCA|AROA|AIDA|AGPA|AIPA|ANPA|ANVA|APKA|ASCA)[A-Z0-9]{16}\b"),
    re.compile(r"(?<![A-Za-z0-9/+=])(?:IQoJb3JpZ2lu|FwoGZXIvYXdz|FQoGZXIvYXdz|AQo[A-Z]b?Zp)[A-Za-z0-9/+=%]{16,}"),
    re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?"),
    re.compile(r"\b(?:hf|ghp|gho|ghs|glpat|ya29)[_.-][A-Za-z0-9_-]{20,}"),
    # A secret access key: 40 characters of base64, told from a path or a hash by all kinds of letters in it.
    re.compile(
        r"(?<![A-Za-z0-9/+=])(?=[a-z0-9/+=]*[A-Z])(?=[A-Z0-9/+=]*[a-z])(?=[A-Za-z/+=]*[0-9])[A-Za-z0-9/+=]{40}"
        r"(?![A-Za-z0-9/+=])"
    ),
)


def redact(text: str) -> str:
    """Text without any key, secret, token, signature or password that has a known shape.

    Redacting twice changes nothing more. Text without such shapes comes back as it is.
    """
    for value in _from_environment():
        text = text.replace(value, GONE)
    for shape in _SHAPES:
        text = shape.sub(lambda match: match.groupdict().get("keep", "") + GONE, text)
    return text


def is_credential_name(name: str) -> bool:
    """Whether a configuration key of this name would hold a credential."""
    return re.fullmatch(rf"(?i)(?:.*[_-])?(?:{_NAMES}|key|credentials?)", name) is not None


def _from_environment() -> list[str]:
    values = {os.environ.get(name, "") for name in _SECRET_VARIABLES}
    return sorted((value for value in values if len(value) >= _MIN_LENGTH), key=len, reverse=True)
