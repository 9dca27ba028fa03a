"""The client: from a folder of pictures to a training job, checked before it starts.

Importing it pulls in neither torch nor a SageMaker SDK.
"""

from launcher.api import check, contact_sheet, estimate, estimator, fit, model_trainer, request
from launcher.aws.service_errors import ServiceError
from launcher.jobs.job import Job, JobFailed, JobStopped, JobSummary, attach, list_jobs
from launcher.local.run import local_services
from launcher.training_request import Resources

__all__ = [
    "Job",
    "JobFailed",
    "JobStopped",
    "JobSummary",
    "Resources",
    "ServiceError",
    "attach",
    "check",
    "contact_sheet",
    "estimate",
    "estimator",
    "fit",
    "list_jobs",
    "local_services",
    "model_trainer",
    "request",
]
