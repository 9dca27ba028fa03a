"""Groups of the registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.aws.service_errors import Kind, ServiceError, asking


def make_group(request: Mapping[str, Any], sagemaker: Any) -> None:
    """Makes a group that is missing.

    Args:
        request: of ``create_model_package_group``.

    Raises:
        ServiceError: SageMaker refuses it, or can't be reached.
    """
    group = request["ModelPackageGroupName"]
    try:
        with asking(f"the group {group} can't be looked at"):
            sagemaker.describe_model_package_group(ModelPackageGroupName=group)
        return
    except ServiceError as error:
        if error.kind not in (Kind.MISSING, Kind.OTHER):  # SageMaker has no code of its own for it
            raise
    with asking(f"the group {group} was not made"):
        sagemaker.create_model_package_group(**request)
