"""Secrets that hyperparameters name, from AWS Secrets Manager."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dreambooth_sm.errors import UserError


def read_secret(knob: str, secret: str, keys: Sequence[str], what: str) -> dict[str, str]:
    """Reads a secret: a text, which is the value of the first key, or JSON with some of the keys.

    Args:
        knob: that names the secret, for messages.
        keys: the names that a value may have.
        what: a value is, for messages: ``a token``.

    Returns:
        at least one value by its key.

    Raises:
        UserError: where the secret can't be read, or holds none of the keys.
    """
    try:
        text = secret_text(knob, secret)
        found = json.loads(text) if text.startswith("{") else {keys[0]: text}
        values = {key: str(found[key]) for key in keys if key in found}
    except ValueError:  # without the error, which may quote the secret
        values = {}
    if not values:
        of = f"the key {keys[0]}" if len(keys) == 1 else f"one of the keys {', '.join(keys)}"
        raise UserError(f"{knob}: {secret} holds neither {what} nor JSON with {of}")
    return values


def secret_text(option: str, secret: str, client: Any = None) -> str:
    """The text of a secret.

    Args:
        option: that names the secret, for messages.
        client: of Secrets Manager; default: that of the standard AWS settings.

    Raises:
        UserError: where it can't be read, or holds no text.
    """
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        found = (client or boto3.client("secretsmanager")).get_secret_value(SecretId=secret)
    except (BotoCoreError, ClientError) as error:
        raise UserError(
            f"{option}: {secret} can't be read from AWS Secrets Manager ({error}); allow whoever reads it "
            "secretsmanager:GetSecretValue on it"
        ) from None
    return str(found.get("SecretString", "")).strip()
