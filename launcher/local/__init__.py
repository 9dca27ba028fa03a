"""SageMaker on this machine: embedded services that really run training jobs, as processes or in containers."""
