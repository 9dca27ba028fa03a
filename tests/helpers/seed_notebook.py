"""The training cell of the quick kit's DreamBooth notebook, as its users have it: a raw Estimator of the SDK 2.

Run as ``python seed_notebook.py ROLE IMAGE BUCKET`` in an environment with that SDK; prints the body that went to
SageMaker. Settings of the notebook's own are at its values; ``json_encode_hyperparameters`` is its helper.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import boto3
from sagemaker import Session
from sagemaker.estimator import Estimator

role, image_uri, bucket = sys.argv[1:]
sent: list[Any] = []
session = boto3.Session()
session.events.register("before-call.sagemaker.CreateTrainingJob", lambda params, **_: sent.append(params["body"]))

environment = {
    "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:32",
    "LD_LIBRARY_PATH": "${LD_LIBRARY_PATH}:/opt/conda/lib/",
}
hyperparameters = {
    "model_name": "aws-trained-dreambooth-model",
    "mixed_precision": "fp16",
    "pretrained_model_name_or_path": "runwayml/stable-diffusion-v1-5",
    "instance_data_dir": "/opt/ml/input/data/images/",
    "class_data_dir": "/opt/ml/input/data/class_images/",
    "with_prior_preservation": True,
    "models_path": "/opt/ml/model/",
    "manul_upload_model_path": "s3://bucket/dreambooth/trained_models",
    "instance_prompt": r"photo\ of\ zwx\  toy",
    "class_prompt": r"photo\ of\ a\ cat toy",
    "resolution": 512,
    "train_batch_size": 1,
    "sample_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-06,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "num_class_images": 50,
    "max_train_steps": 300,
    "save_steps": 100,
    "attention": "xformers",
    "prior_loss_weight": 0.5,
    "use_ema": True,
    "train_text_encoder": False,
    "not_cache_latents": True,
    "gradient_checkpointing": True,
    "save_use_epochs": False,
    "use_8bit_adam": False,
}


def json_encode_hyperparameters(values: dict[str, Any]) -> dict[str, str]:
    return {str(name): json.dumps(value) for name, value in values.items()}


for values in (hyperparameters, json_encode_hyperparameters(hyperparameters)):
    estimator = Estimator(
        role=role,
        instance_count=1,
        instance_type="ml.g4dn.xlarge",
        image_uri=image_uri,
        hyperparameters=values,
        environment=environment,
        # Asking for the account's own bucket would go past the embedded services.
        sagemaker_session=Session(session, default_bucket=bucket),
    )
    estimator.fit({"images": f"s3://{bucket}/dreambooth/images/"}, wait=False)
print(json.dumps([json.loads(body) for body in sent]))
