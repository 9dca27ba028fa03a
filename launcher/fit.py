"""``launcher.fit``: one call from pictures to a trained pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dreambooth_sm.data.check import check_folder
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from launcher.local import TrainingJob, run_locally

# Input channels, as the seed's notebook names them.
IMAGES_CHANNEL = "images"
MODEL_CHANNEL = "model"
_CHANNELS = "/opt/ml/input/data"


def fit(
    images: str | Path,
    *,
    instance_prompt: str,
    class_prompt: str | None = None,
    base_model: str | Path | None = None,
    output: str | None = None,
    instance_type: str = "local",
    directory: str | Path | None = None,
    log: Callable[[str], None] = print,
    **hyperparameters: Any,
) -> TrainingJob:
    """Trains a Stable Diffusion model on a few pictures of a subject, and waits for the result.

    Args:
        images: folder with 4 to 20 pictures: a local path or ``s3://bucket/prefix``.
        instance_prompt: prompt of the subject with a rare token, such as "photo of zwx toy".
        class_prompt: prompt of the class, such as "photo of a toy"; turns prior preservation on.
        base_model: hub id, or a local diffusers directory; the schema's default if left out.
        output: ``s3://bucket/prefix`` for the trained pipeline; left out, it stays in the job's directory.
        instance_type: ``"local"`` runs the job as a process of this machine, exactly as the container would.
        directory: where the local job's ``/opt/ml`` tree is laid out; a temporary directory if left out.
        log: gets each line of the job's log.
        hyperparameters: any name of :class:`dreambooth_sm.hyperparameters.Hyperparameters`.

    Returns:
        the finished job: where the model lies, metrics, seconds per phase.

    Raises:
        UserError: for bad input, before anything starts.
        JobFailed: with the job's own reason.

    Example:
        >>> job = fit("duck/", instance_prompt="photo of zwx toy", class_prompt="photo of a toy",
        ...           base_model="my-model/", max_train_steps=400)  # doctest: +SKIP
        >>> job.model  # doctest: +SKIP
        '/tmp/dreambooth-sm-.../model'
    """
    problems: list[str] = []
    if instance_type != "local":
        problems.append(
            f"instance_type={instance_type!r}: this version starts jobs on this machine only; write 'local', or pass "
            "the image to sagemaker.estimator.Estimator as the README shows"
        )
    if "instance_data_dir" in hyperparameters:
        problems.append("instance_data_dir: the pictures are `images`; leave instance_data_dir out")
    values = {"instance_prompt": instance_prompt, "class_prompt": class_prompt, "manual_upload_model_path": output}
    values |= hyperparameters
    channels: dict[str, str] = {IMAGES_CHANNEL: str(images)}
    values["instance_data_dir"] = f"{_CHANNELS}/{IMAGES_CHANNEL}"
    if base_model is not None:
        values["pretrained_model_name_or_path"] = str(base_model)
        if Path(base_model).is_dir():
            channels[MODEL_CHANNEL] = str(base_model)
            values["pretrained_model_name_or_path"] = f"{_CHANNELS}/{MODEL_CHANNEL}"
        elif isinstance(base_model, Path) or base_model.startswith(("/", ".", "~")):
            problems.append(f"base_model: {base_model} is no directory; name a hub id or a diffusers directory")
    parsed = Hyperparameters()
    try:
        parsed = Hyperparameters.parse({name: value for name, value in values.items() if value is not None})
    except UserError as error:
        problems += error.problems
    problems += _check_images(str(images), parsed)
    if problems:
        raise UserError(problems)
    return run_locally(parsed.to_sagemaker(), channels, directory=directory, log=log)


def _check_images(images: str, h: Hyperparameters) -> list[str]:
    """The findings of the container's own check, where the pictures are on this machine."""
    if images.startswith("s3://"):
        return []
    if not Path(images).is_dir():
        return [f"images: {images} is no folder; name a folder with 4 to 20 pictures, or s3://bucket/prefix"]
    return list(check_folder(Path(images), h, name="images").errors)
