"""SageMaker pipelines: pictures are checked, a model is trained and measured, and a good one is registered."""
