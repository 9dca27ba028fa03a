"""The client: from a folder of pictures to a training job, checked before it starts.

Importing it pulls in neither torch nor a SageMaker SDK.
"""

from launcher.fit import fit
from launcher.job import Job, JobFailed, JobStopped, JobSummary, attach, list_jobs
from launcher.local import local_services

__all__ = ["Job", "JobFailed", "JobStopped", "JobSummary", "attach", "fit", "list_jobs", "local_services"]
