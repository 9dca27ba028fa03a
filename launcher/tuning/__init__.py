"""Tuning: SageMaker searches for the hyperparameters that a subject is learned best with."""
