"""The client: from a folder of pictures to a training job, checked before it starts.

Importing it pulls in neither torch nor a SageMaker SDK. ``api.py`` has its functions; ``aws``, ``jobs`` and ``local``
are the account, jobs after their start, and SageMaker on this machine.
"""

from launcher.api import (
    JobSummary,
    attach,
    check,
    contact_sheet,
    estimate,
    estimator,
    fit,
    list_jobs,
    model_trainer,
    request,
)
from launcher.aws.service_errors import ServiceError
from launcher.endpoints.api import attach_endpoint, deploy
from launcher.endpoints.endpoint import Endpoint, EndpointFailed, StreamedPicture
from launcher.endpoints.hosted import HostedEndpoint
from launcher.endpoints.requests import endpoint_requests
from launcher.events.api import notify, stop_notifying
from launcher.fleets.api import attach_fleet, check_many, fit_many
from launcher.fleets.fleet import Fleet
from launcher.fleets.status import FleetStatus
from launcher.jobs.job import Job, JobFailed, JobStopped
from launcher.local.run import local_services
from launcher.pipelines.api import attach_pipeline, pipeline, pipeline_request, sagemaker_pipeline
from launcher.pipelines.pipeline import PipelineExecution, TrainingPipeline
from launcher.registry.packages import ModelPackage
from launcher.resources import Resources
from launcher.tuning.api import attach_tuning, check_tuning, tune, tuning_request
from launcher.tuning.status import Trial, TuningStatus
from launcher.tuning.tuning import Tuning

__all__ = [
    "Endpoint",
    "EndpointFailed",
    "Fleet",
    "FleetStatus",
    "HostedEndpoint",
    "Job",
    "JobFailed",
    "JobStopped",
    "JobSummary",
    "ModelPackage",
    "PipelineExecution",
    "Resources",
    "ServiceError",
    "StreamedPicture",
    "TrainingPipeline",
    "Trial",
    "Tuning",
    "TuningStatus",
    "attach",
    "attach_endpoint",
    "attach_fleet",
    "attach_pipeline",
    "attach_tuning",
    "check",
    "check_many",
    "check_tuning",
    "contact_sheet",
    "deploy",
    "endpoint_requests",
    "estimate",
    "estimator",
    "fit",
    "fit_many",
    "list_jobs",
    "local_services",
    "model_trainer",
    "notify",
    "pipeline",
    "pipeline_request",
    "request",
    "sagemaker_pipeline",
    "stop_notifying",
    "tune",
    "tuning_request",
]
