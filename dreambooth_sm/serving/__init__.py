"""Serving what was trained: pictures by HTTP, as SageMaker asks for them."""
