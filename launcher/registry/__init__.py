"""SageMaker's model registry: trained models as versions of a group, with what their reports say."""
