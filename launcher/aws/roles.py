"""Execution roles: where a notebook's is named, and whom a role trusts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from launcher.aws.clients import Clients
from launcher.aws.service_errors import ServiceError, asking

_SAGEMAKER = frozenset({"sagemaker.amazonaws.com", "sagemaker.amazonaws.com.cn"})
# Where AWS keeps roles of its own, which no job can run with.
_RESERVED = {
    "aws-reserved/": "IAM Identity Center (SSO) keeps for people",
    "AWSReservedSSO_": "IAM Identity Center (SSO) keeps for people",
    "aws-service-role/": "AWS keeps for one of its services",
}


def role_of_notebook(metadata: Path, clients: Clients) -> str | None:
    """The role of the SageMaker notebook that this runs in, asked for as the SageMaker SDK does it.

    Args:
        metadata: the file in which notebook instances and Studio's spaces describe themselves.

    Returns:
        the role's ARN; None outside of a notebook, and where it may not be asked for.
    """
    try:
        known = json.loads(metadata.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(known, dict):
        return None
    if role := known.get("ExecutionRoleArn"):
        return str(role)
    try:
        with asking("the notebook's role can't be asked for"):
            return _ask_for_role(known, clients("sagemaker"))
    except (ServiceError, KeyError):
        return None


def _ask_for_role(known: Mapping[str, Any], sagemaker: Any) -> str | None:
    domain, profile = known.get("DomainId"), known.get("UserProfileName")
    if domain is None:
        return str(sagemaker.describe_notebook_instance(NotebookInstanceName=known["ResourceName"])["RoleArn"])
    if space := known.get("SpaceName"):
        described = sagemaker.describe_space(DomainId=domain, SpaceName=space)
        private = described.get("SpaceSharingSettings", {}).get("SharingType") == "Private"
        profile = described["OwnershipSettings"]["OwnerUserProfileName"] if private else None
    if profile:
        user = sagemaker.describe_user_profile(DomainId=domain, UserProfileName=profile)
        if role := user.get("UserSettings", {}).get("ExecutionRole"):
            return str(role)
    settings = "DefaultUserSettings" if profile else "DefaultSpaceSettings"
    return str(sagemaker.describe_domain(DomainId=domain)[settings]["ExecutionRole"])


def reserved_for(arn: str) -> str | None:
    """Tells whom AWS keeps a role for, if not for jobs."""
    path = arn.partition(":role/")[2]
    return next((owner for start, owner in _RESERVED.items() if path.startswith(start)), None)


def trusts_sagemaker(policy: Mapping[str, Any], account: str) -> bool | None:
    """Whether a role's trust policy lets SageMaker assume it; None where conditions decide that can't be checked here.

    Args:
        account: that the job will run in.

    Examples:
        >>> allow = {"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}, "Action": "sts:AssumeRole"}
        >>> trusts_sagemaker({"Statement": allow}, "123456789012")
        True
        >>> deny = {"Effect": "Deny", "Principal": "*", "Action": "sts:*"}
        >>> trusts_sagemaker({"Statement": [allow, deny]}, "123456789012")
        False
    """
    statements = policy.get("Statement", [])
    verdicts: dict[str, list[bool | None]] = {"Allow": [False], "Deny": [False]}
    for statement in [statements] if isinstance(statements, Mapping) else statements:
        if _is_about_sagemaker(statement) and _is_about_assuming(statement):
            verdicts[statement["Effect"]].append(_holds(statement.get("Condition"), account))
    allowed, denied = (_any(verdicts[effect]) for effect in ("Allow", "Deny"))
    if denied or allowed is False:
        return False
    return True if allowed and denied is False else None


def _any(verdicts: list[bool | None]) -> bool | None:
    return True if True in verdicts else None if None in verdicts else False


def _is_about_sagemaker(statement: Mapping[str, Any]) -> bool:
    named = statement.get("Principal", statement.get("NotPrincipal", {}))
    if isinstance(named, str):
        found = named == "*"
    else:
        services = set(_listed(named.get("Service", [])))
        found = bool(services & (_SAGEMAKER | {"*"})) or "*" in _listed(named.get("AWS", []))
    return found == ("Principal" in statement)


def _is_about_assuming(statement: Mapping[str, Any]) -> bool:
    actions = _listed(statement.get("Action", statement.get("NotAction", [])))
    return any(fnmatchcase("sts:assumerole", action.lower()) for action in actions) == ("Action" in statement)


def _holds(condition: Mapping[str, Any] | None, account: str) -> bool | None:
    """Whether a condition is met; None where that is not known here."""
    if not condition:
        return True
    tests = {(test, name.lower()): values for test, pairs in condition.items() for name, values in pairs.items()}
    known = tests.pop(("StringEquals", "aws:sourceaccount"), account)
    if account not in map(str, _listed(known)):
        return False
    return None if tests else True


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
