"""The client: from a folder of pictures to a training job, checked before it starts.

Importing it pulls in neither torch nor a SageMaker SDK.
"""

from launcher.fit import fit
from launcher.local import JobFailed, TrainingJob, local_s3

__all__ = ["JobFailed", "TrainingJob", "fit", "local_s3"]
