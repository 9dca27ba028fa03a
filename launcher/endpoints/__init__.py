"""Endpoints: what draws with a trained model on request, on SageMaker or on this machine."""
