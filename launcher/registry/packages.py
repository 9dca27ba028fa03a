"""A version in the registry, found by its ARN."""

from __future__ import annotations

import re
from typing import Any

from dreambooth_sm.errors import UserError
from launcher.aws.clients import Clients
from launcher.aws.service_errors import asking
from launcher.registry.requests import APPROVED, REJECTED

_ARN = re.compile(r"arn:aws[a-z-]*:sagemaker:[a-z0-9-]+:\d{12}:model-package/\S+")


def is_package(text: object) -> bool:
    """Whether it is the ARN of a model package."""
    return isinstance(text, str) and bool(_ARN.fullmatch(text))


class ModelPackage:
    """A trained model in the registry.

    Args:
        arn: of the package; ``launcher.deploy`` takes it.
        clients: of AWS services; default: those of the standard AWS settings.
    """

    def __init__(self, arn: str, clients: Clients | None = None) -> None:
        self.arn = arn
        self._clients = clients or Clients()

    def __repr__(self) -> str:
        return f"ModelPackage({self.arn!r})"

    def describe(self) -> dict[str, Any]:
        """SageMaker's own description.

        Raises:
            ServiceError: it is not there, or may not be looked at.
        """
        with asking(f"{self.arn} can't be looked at"):
            return dict(self._clients("sagemaker").describe_model_package(ModelPackageName=self.arn))

    @property
    def approval(self) -> str:
        """``PendingManualApproval``, ``Approved`` or ``Rejected``, now."""
        return str(self.describe()["ModelApprovalStatus"])

    def approve(self, why: str = "") -> None:
        """Lets it be deployed.

        Args:
            why: is kept with it.

        Raises:
            ServiceError: SageMaker refuses it.
        """
        self._decide(APPROVED, why)

    def reject(self, why: str = "") -> None:
        """Keeps it from being deployed; for the arguments see :meth:`approve`."""
        self._decide(REJECTED, why)

    def _decide(self, approval: str, why: str) -> None:
        reason = {"ApprovalDescription": why} if why else {}
        with asking(f"{self.arn} can't be changed"):
            self._clients("sagemaker").update_model_package(
                ModelPackageArn=self.arn, ModelApprovalStatus=approval, **reason
            )

    def deployable(self) -> dict[str, Any]:
        """The container that serves it.

        Raises:
            UserError: nobody has approved it.
        """
        found = self.describe()
        if (approval := found.get("ModelApprovalStatus")) != APPROVED:
            raise UserError(
                f"{self.arn} is {approval}; approve it first: launcher.ModelPackage({self.arn!r}).approve()"
            )
        (container,) = found["InferenceSpecification"]["Containers"]
        return dict(container)
