"""The client: from a folder of pictures to a training job, checked before it starts.

Importing it pulls in neither torch nor a SageMaker SDK.
"""

from launcher.fit import check, estimate, estimator, fit, model_trainer, request
from launcher.local import JobFailed, TrainingJob, local_s3
from launcher.request import Resources

__all__ = [
    "JobFailed",
    "Resources",
    "TrainingJob",
    "check",
    "estimate",
    "estimator",
    "fit",
    "local_s3",
    "model_trainer",
    "request",
]
