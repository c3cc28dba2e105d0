"""What looks like a secret: keys of a recipe, values, files of a folder. Nothing of the kind is written or published."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_KEY = re.compile(
    r"^(token|secret|(\w*_)?(password|passwd|passphrase|api_?key|access_?key|secret_?key|private_?key|credentials?)"
    r"|(hub|push_to_hub|auth|use_auth|access|api|secret|bearer|session|hf|github|wandb|\w*_auth|\w*_access|\w*_api)_token)$",
    re.IGNORECASE,
)
_VALUES = {
    "a token of the Hub": r"\bhf_[A-Za-z0-9]{16,}\b",
    "an API key": r"\bsk-(?:ant-|proj-|live-)?[A-Za-z0-9_-]{20,}|\b(?:sk|rk)_live_[A-Za-z0-9]{16,}|\bAIza[\w-]{35}\b",
    "a token of GitHub": r"\bgh[pousr]_[A-Za-z0-9]{20,}\b|\bgithub_pat_\w{20,}\b",
    "a token of GitLab": r"\bglpat-[\w-]{20,}\b",
    "a token of Slack": r"\bxox[abprs]-[\w-]{10,}",
    "an access key of AWS": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----",
    "a web token": r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "an address with a password": r"\b[a-z][a-z0-9+.-]*://[^\s/:@'\"]*:[^\s/@'\"]+@",
    "an address with a token": r"\b[a-z][a-z0-9+.-]*://[A-Za-z0-9_-]{16,}@",
}
_PATTERNS = {what: re.compile(pattern) for what, pattern in _VALUES.items()}
_ENVIRONMENT = re.compile(r"TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 8
_FILE = re.compile(
    r"^(\.env.*|.*\.env|\.?netrc|_netrc|(\w*[-_.])?(secrets?|credentials?|passwords?|passwd|api_?keys?|tokens?)"
    r"(\.(txt|json|ya?ml|toml|ini|cfg|csv|env|properties|bak|old))?|stored_tokens|\.git-credentials|\.npmrc|\.pypirc|\.htpasswd"
    r"|id_(rsa|dsa|ecdsa|ed25519)\w*|.*\.(pem|key|p12|pfx|jks|keystore|kdbx|ppk|asc|gpg)|service[-_]account.*\.json)$",
    re.IGNORECASE,
)
_FOLDERS = {".ssh", ".aws", ".gnupg", ".kube", ".azure", ".docker", ".huggingface"}
_LONGEST_TEXT = 64 << 20
_WEIGHTS = (".safetensors",)


def secret_in(key: str, value: Any) -> str | None:
    """Say what secret a value of a recipe or a table holds, in words without it; None where there is none.

    Args:
        key: the last part of its name.
        value: of any kind, nested or not.
    """
    if isinstance(value, Mapping):
        return next((found for name, item in value.items() if (found := secret_in(str(name), item))), None)
    if isinstance(value, (list, tuple)):
        return next((found for item in value if (found := secret_in(key, item))), None)
    if not isinstance(value, str) or not value:
        return None
    return "a secret" if _KEY.match(key) else secret_text(value)


def secret_text(text: str) -> str | None:
    """Say what secret a text holds, by its form or because the environment holds it under a telling name; None for none."""
    found = next((what for what, pattern in _PATTERNS.items() if pattern.search(text)), None)
    if found is not None:
        return found
    return next((f"the value of ${name}" for name, value in _secrets_of_the_environment() if value in text), None)


def _secrets_of_the_environment() -> Iterator[tuple[str, str]]:
    for name, value in os.environ.items():
        if _ENVIRONMENT.search(name) and len(value) >= _SHORTEST and not Path(value).exists():
            yield name, value


def secret_file(folder: Path, path: str) -> str | None:
    """Say why a file looks like a secret, by its name, by the folder it lies in or by its text; None where it doesn't.

    Args:
        folder: that is to be published.
        path: of the file, relative to it.
    """
    *folders, name = path.split("/")
    if _FILE.match(name) or _FOLDERS & set(folders):
        return "its name is that of a secret"
    file = folder / path
    if name.endswith(_WEIGHTS) or file.stat().st_size > _LONGEST_TEXT:
        return None
    return secret_text(file.read_bytes().decode("utf-8", errors="replace"))
