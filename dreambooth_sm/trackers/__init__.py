"""Trackers: TensorBoard, MLflow and Weights & Biases, told by a job while it runs."""
