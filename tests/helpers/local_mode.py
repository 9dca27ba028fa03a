"""A job in the local mode of a SageMaker SDK, as its users start one: the SDK runs the image with docker compose.

Run in an environment with that SDK: ``python local_mode.py estimator|model_trainer``, with a JSON object on standard
input: ``image``, ``hyperparameters``, ``channels`` (names to S3 locations), ``environment``, ``role``, ``output``,
``directory``.
Prints where the model lies.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import boto3


def with_estimator(job: dict[str, Any]) -> str:
    from sagemaker.estimator import Estimator
    from sagemaker.local import LocalSession

    session = LocalSession(boto3.Session(), s3_endpoint_url=job["environment"]["AWS_ENDPOINT_URL_S3"])
    session.config = {"local": {"container_root": job["directory"]}}
    estimator = Estimator(
        image_uri=job["image"],
        role=job["role"],
        instance_count=1,
        instance_type="local",
        hyperparameters=job["hyperparameters"],
        environment=job["environment"],
        output_path=job["output"],
        sagemaker_session=session,
    )
    estimator.fit(job["channels"])
    return str(estimator.model_data)


def with_model_trainer(job: dict[str, Any]) -> str:
    from sagemaker.core.shapes import Channel, DataSource, S3DataSource
    from sagemaker.core.training.configs import Compute
    from sagemaker.train import ModelTrainer
    from sagemaker.train.model_trainer import Mode

    def channel(name: str, uri: str) -> Channel:
        source = S3DataSource(s3_data_type="S3Prefix", s3_uri=uri, s3_data_distribution_type="FullyReplicated")
        return Channel(channel_name=name, data_source=DataSource(s3_data_source=source))

    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    ModelTrainer(
        training_image=job["image"],
        role=job["role"],
        training_mode=Mode.LOCAL_CONTAINER,
        compute=Compute(instance_type="local_cpu", instance_count=1),
        hyperparameters=job["hyperparameters"],
        environment=job["environment"],
        input_data_config=[channel(name, uri) for name, uri in job["channels"].items()],
        local_container_root=job["directory"],
    ).train()
    return str(job["directory"])


if __name__ == "__main__":
    run = {"estimator": with_estimator, "model_trainer": with_model_trainer}[sys.argv[1]]
    print(run(json.load(sys.stdin)))
