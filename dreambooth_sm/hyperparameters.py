"""Every knob of the job, once: name, type, default, help, allowed values.

The container, the launcher, the command line and the docs all read this schema. It imports no torch.

SageMaker hands each hyperparameter over as a string, and some SDK versions encode it as JSON once more;
:meth:`Hyperparameters.parse` undoes both and reports every problem of the input in one
:class:`~dreambooth_sm.errors.UserError`. ``python -m dreambooth_sm.hyperparameters`` prints the docs' table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dreambooth_sm.architecture import RESOLUTIONS, Architecture, find_architecture
from dreambooth_sm.errors import UserError
from dreambooth_sm.knobs.concepts import Concept
from dreambooth_sm.knobs.decode import PLATFORM_KEY, decode, split_arguments
from dreambooth_sm.knobs.docs import markdown_table
from dreambooth_sm.knobs.escapes import is_text, texts
from dreambooth_sm.knobs.messages import near_name, readable, short, unknown
from dreambooth_sm.knobs.ranges import (
    Auto,
    Few,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    Seed,
    Steps,
    StepsOrNone,
)
from dreambooth_sm.printing import has_userinfo
from dreambooth_sm.storage import S3Options, S3Uri
from dreambooth_sm.toybox import NAME as TOYBOX

DEFAULT_TRAIN_STEPS = 800
# The channel names of the seed notebook, as SageMaker mounts them.
DEFAULT_INSTANCE_DATA_DIR = "/opt/ml/input/data/images"
DEFAULT_CLASS_DATA_DIR = "/opt/ml/input/data/class_images"
DEFAULT_MODELS_PATH = "/opt/ml/model"
# Stands for a picture's caption in `instance_prompt`.
FILEWORDS = "[filewords]"

# Other spellings that users of the seed have in their notebooks.
ALIASES = {"manul_upload_model_path": "manual_upload_model_path"}
# Keys that SageMaker and its SDKs add by themselves.
_ENCODERS = re.compile(r"\s*(judge|(dino|clip)=\S+(\s+(?!\2)(dino|clip)=\S+)?)\s*")
# Unknown names that get a line of their own.
_MOST_UNKNOWN = 20
# A model of the hub: its owner and its name.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)


def _knob(default: Any, group: str, help: str, *, resume: Literal["same", "free"] = "same") -> Any:
    """
    Args:
        resume: whether a job that is resumed from a checkpoint must have the value of the one that wrote it. ``free``
            is for what leaves the weights as they would have been (places, names, logs, memory and speed), and for
            what is compared otherwise (pictures by their content, the number of steps by the schedule).
    """
    return Field(default, description=help, json_schema_extra={"group": group, "resume": resume})


class Hyperparameters(BaseModel):
    """The hyperparameters of one DreamBooth job (Ruiz et al. 2023, "DreamBooth: Fine Tuning Text-to-Image
    Diffusion Models for Subject-Driven Generation").

    ``"auto"`` leaves a choice to the plan for the card; an explicit value always wins over the plan.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    # What is trained, and where it goes
    pretrained_model_name_or_path: str = _knob(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "Model",
        "Base model: hub id, diffusers directory (a channel, for example), `s3://` prefix or object, or a "
        "single-file checkpoint (`.safetensors`, `.ckpt`).",
    )
    base_architecture: Literal["auto", "sd", "sdxl"] = _knob(
        "auto",
        "Model",
        "Kind of the base model, by which memory and resolution are planned before anything is downloaded: Stable "
        "Diffusion 1 and 2, or XL. auto: as its files or its name (`xl` in it) say.",
        resume="free",
    )
    pretrained_vae_name_or_path: str | None = _knob(
        None, "Model", "Replacement for the base model's VAE: as above; a file may hold the VAE alone."
    )
    revision: str | None = _knob(None, "Model", "Revision of the base model on the hub.")
    variant: str | None = _knob(
        None, "Model", "Variant of the base model's files on the hub; None takes fp16 files where there are some."
    )
    hf_token_secret: str | None = _knob(
        None,
        "Model",
        "Name of the AWS Secrets Manager secret that holds the hub's token. A token in the environment (HF_TOKEN) "
        "needs none; never write a token here.",
        resume="free",
    )
    use_ema_weights: bool = _knob(
        False, "Model", "Start from the average (EMA) that a single-file checkpoint carries beside its weights."
    )
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = _knob(
        "auto", "Model", "What the base model's UNet predicts. auto: as the model says."
    )
    model_name: str = _knob(
        "aws-trained-dreambooth-model",
        "Model",
        "Name of the trained model, as the log gives it.",
        resume="free",
    )
    models_path: str = _knob(
        DEFAULT_MODELS_PATH,
        "Model",
        "Directory in the container that the trained pipeline is written to.",
        resume="free",
    )
    export: Literal["diffusers", "single_file", "both"] = _knob(
        "diffusers",
        "Model",
        "What the trained model is written as: a diffusers directory, one `.safetensors` file in the original layout "
        "for WebUI and ComfyUI, or both.",
        resume="free",
    )
    export_precision: Literal["fp16", "bf16", "fp32"] = _knob(
        "fp16",
        "Model",
        "Precision of the trained weights' files.",
        resume="free",
    )
    manual_upload_model_path: str | None = _knob(
        None,
        "Model",
        "`s3://bucket/prefix`: upload the pipeline directory there, recursively, and leave nothing for "
        "SageMaker to pack. Also accepted as `manul_upload_model_path`.",
        resume="free",
    )
    output_mode: Literal["auto", "direct", "uncompressed", "archive"] = _knob(
        "auto",
        "Model",
        "How the model leaves the instance. direct: the job uploads it to manual_upload_model_path; uncompressed, "
        "archive: the job leaves it in models_path, and SageMaker uploads it as files or as model.tar.gz, whichever "
        "the job's output configuration says. auto: direct if there is a manual_upload_model_path.",
        resume="free",
    )
    s3_kms_key_id: str | None = _knob(
        None, "Model", "Id or ARN of the KMS key that encrypts what the job uploads.", resume="free"
    )
    s3_encryption: Literal["AES256", "aws:kms", "aws:kms:dsse"] | None = _knob(
        None,
        "Model",
        "Encryption of what the job uploads: AES256 with S3's own keys, the others with s3_kms_key_id or the account's "
        "key; None: with a key aws:kms, otherwise the bucket's.",
        resume="free",
    )
    s3_acl: (
        Literal["private", "bucket-owner-full-control", "bucket-owner-read", "authenticated-read", "public-read"] | None
    ) = _knob(None, "Model", "Canned ACL of what the job uploads.", resume="free")
    s3_tags: str | None = _knob(
        None, "Model", "Tags of what the job uploads, at most 10: `team=toys,stage=test`.", resume="free"
    )
    s3_storage_class: (
        Literal["STANDARD", "STANDARD_IA", "ONEZONE_IA", "INTELLIGENT_TIERING", "GLACIER_IR", "REDUCED_REDUNDANCY"]
        | None
    ) = _knob(None, "Model", "Storage class of what the job uploads; None: the bucket's.", resume="free")
    s3_requester_pays: bool = _knob(False, "Model", "Pay for requests to buckets whose requesters pay.", resume="free")
    s3_endpoint_url: str | None = _knob(
        None,
        "Model",
        "S3-compatible server that the job uploads to: `https://minio.example:9000`; None: AWS.",
        resume="free",
    )
    s3_addressing_style: Literal["auto", "path", "virtual"] | None = _knob(
        None,
        "Model",
        "Where the bucket's name is in the addresses of that server: in the path, or, as Alibaba's and Tencent's want "
        "it, in the host's name (virtual); None: as the AWS settings say, or in the path.",
        resume="free",
    )

    # Pictures and prompts
    instance_data_dir: str = _knob(
        DEFAULT_INSTANCE_DATA_DIR, "Data", "Directory with the pictures of the subject.", resume="free"
    )
    class_data_dir: str = _knob(
        DEFAULT_CLASS_DATA_DIR,
        "Data",
        "Directory with class images; missing ones are generated, and kept there as latents (or in a scratch "
        "directory if this one is read-only).",
        resume="free",
    )
    instance_prompt: str | None = _knob(
        None,
        "Data",
        f'Prompt of the subject, with a rare token: "photo of zwx toy". `{FILEWORDS}` in it stands for the caption of '
        "each picture, or for the words of its name where it has none.",
    )
    class_prompt: str | None = _knob(None, "Data", 'Prompt of the class, without the token: "photo of a toy".')
    concepts_list: str | tuple[Concept, ...] | None = _knob(
        None,
        "Data",
        "Several subjects in one run: path of a JSON file, or the JSON itself: a list of {instance_data_dir, "
        "class_data_dir, instance_prompt, class_prompt}.",
        resume="free",
    )
    resolution: Annotated[int, Ge(64), Le(2048)] = _knob(
        RESOLUTIONS["sd"],
        "Data",
        f"Side of the training pictures, in pixels; a multiple of 8. {RESOLUTIONS['sdxl']} for SDXL if left out.",
    )
    center_crop: bool = _knob(False, "Data", "Crop at the centre instead of at random.")
    aspect_ratio_buckets: bool | Auto = _knob(
        "auto",
        "Data",
        "Train each picture in the shape that shows most of it, of at most resolution squared pixels; false: in "
        "squares. auto: unless center_crop is true.",
    )
    bucket_step: Literal[8, 64] = _knob(
        64, "Data", "Sides of these shapes are multiples of this; 8 cuts off less and makes more shapes."
    )
    on_bad_image: Literal["error", "skip"] = _knob(
        "error",
        "Data",
        "A picture that can't be used ends the job before anything is downloaded, or is left out.",
        resume="free",
    )
    hflip: bool = _knob(False, "Data", "Mirror pictures at random.")
    max_token_length: Literal[75, 150, 225] = _knob(
        75, "Data", "Longest prompt, in tokens; prompts over 75 are encoded in chunks of 75."
    )
    pad_tokens: bool = _knob(True, "Data", "Pad prompts to the text encoder's full length.")
    shuffle_tags: bool = _knob(False, "Data", "Shuffle the comma-separated parts of a prompt.")
    caption_dropout: Fraction = _knob(
        0.0,
        "Data",
        "Probability of showing a picture with the empty prompt instead of its own; class pictures as well.",
    )

    background_weight: Annotated[float, Ge(0), Le(1)] | None = _knob(
        None,
        "Data",
        "Weight in the loss of what lies outside of a picture's mask (`NAME-mask.png`, or its alpha channel); the "
        "subject has 1. None: masks have no part in the loss.",
    )

    # Prior preservation
    with_prior_preservation: bool | Auto = _knob(
        "auto",
        "Prior preservation",
        "Train on class images as well, so that the class is kept. auto: if there is a class prompt.",
    )
    prior: Literal["images", "output"] = _knob(
        "images",
        "Prior preservation",
        "What keeps the class. images: class images. output: the base model's own predictions for the class prompt, on "
        "noised pictures of the subject; no class images are made or read.",
    )
    prior_loss_weight: NonNegativeFloat = _knob(0.5, "Prior preservation", "Weight of the class images' loss.")
    num_class_images: Annotated[int, Ge(1), Le(100_000)] = _knob(
        50, "Prior preservation", "Class images wanted; those that are missing are generated."
    )
    sample_batch_size: Few | Auto = _knob(
        "auto", "Prior preservation", "Class images generated at a time.", resume="free"
    )
    sample_guidance_scale: Annotated[float, Ge(1)] = _knob(
        7.5,
        "Prior preservation",
        "Guidance of generated class images, at middle noise levels. Lower values stay closer to what the base model "
        "knows of the class.",
    )
    class_cache: str | None = _knob(
        None,
        "Prior preservation",
        "s3://bucket/prefix that keeps generated class images for later jobs of the same base model and class prompt.",
        resume="free",
    )

    # How long, and how fast
    max_train_steps: Steps | None = _knob(
        None,
        "Training",
        f"Optimizer steps. Wins over num_train_epochs; {DEFAULT_TRAIN_STEPS} if neither is given.",
        resume="free",
    )
    num_train_epochs: Steps | None = _knob(None, "Training", "Passes over the instance pictures.", resume="free")
    train_batch_size: Few = _knob(
        1, "Training", "Instance pictures a step; prior preservation adds as many class images."
    )
    gradient_accumulation_steps: Few = _knob(1, "Training", "Batches an optimizer step is made of.")
    learning_rate: PositiveFloat = _knob(2e-6, "Training", "Peak learning rate.")
    scale_lr: bool = _knob(
        False, "Training", "Multiply the learning rate by batch size, accumulation steps and processes."
    )
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = _knob("constant", "Training", "Learning-rate schedule.")
    lr_warmup_steps: StepsOrNone = _knob(0, "Training", "Steps over which the learning rate rises from 0.")
    train_text_encoder: bool | Auto = _knob("auto", "Training", "Train the text encoder as well as the UNet.")
    snr_gamma: PositiveFloat | None = _knob(
        None, "Training", "Min-SNR loss weighting (Hang et al. 2023); 5 is usual, None turns it off."
    )
    seed: Seed | None = _knob(None, "Training", "Seed of everything random in the job; None draws one and logs it.")

    # Optimizer
    optimizer: Literal["auto", "blockwise", "adamw"] = _knob(
        "auto",
        "Optimizer",
        "blockwise: ours, with quantised state; adamw: torch's with fp32 weights and state, the reference.",
    )
    use_8bit_adam: bool | Auto = _knob(
        "auto",
        "Optimizer",
        "True: bitsandbytes' 8-bit AdamW on fp32 weights; False: no 8-bit state; auto: the plan's choice.",
    )
    adam_beta1: Fraction = _knob(0.9, "Optimizer", "Decay of the first moment.")
    adam_beta2: Fraction = _knob(0.999, "Optimizer", "Decay of the second moment.")
    adam_weight_decay: NonNegativeFloat = _knob(1e-2, "Optimizer", "Decoupled weight decay.")
    adam_epsilon: PositiveFloat = _knob(1e-8, "Optimizer", "Added to Adam's denominator.")
    max_grad_norm: PositiveFloat | Auto | None = _knob(
        "auto",
        "Optimizer",
        "Clip gradients to this global norm. auto: 1.0 where the plan can clip; None: never.",
    )
    use_ema: bool | Auto = _knob("auto", "Optimizer", "Average the trained weights and save the average.")
    ema_decay: Fraction = _knob(0.999, "Optimizer", "Decay of the average, reached after a warm-up.")

    # Memory and speed
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] = _knob(
        "auto", "Memory and speed", "Precision of the forward and backward pass."
    )
    attention: Literal["auto", "default", "xformers", "flash_attention"] = _knob(
        "auto",
        "Memory and speed",
        "Attention kernels; default is torch's SDPA.",
        resume="free",
    )
    gradient_checkpointing: bool | Auto = _knob(
        "auto",
        "Memory and speed",
        "Recompute activations in the backward pass instead of keeping them.",
        resume="free",
    )
    not_cache_latents: bool | Auto = _knob(
        "auto",
        "Memory and speed",
        "True: encode the pictures at each step; False: encode them once, before training.",
        resume="free",
    )
    torch_compile: bool | Auto = _knob(
        "auto",
        "Memory and speed",
        "Compile the UNet's blocks: some minutes at the start for faster steps. auto: no, until jobs are long.",
        resume="free",
    )
    cuda_graph: bool | Auto = _knob(
        "auto",
        "Memory and speed",
        "Capture the training step as a CUDA graph and replay it. auto: wherever the optimizer allows it.",
        resume="free",
    )
    num_processes: Few | Auto = _knob(
        "auto",
        "Memory and speed",
        "Processes of each instance that train together. auto: one a GPU.",
        resume="free",
    )
    use_cpu: bool = _knob(False, "Memory and speed", "Train on the CPU although there is a GPU.", resume="free")
    use_lora: bool = _knob(
        False, "Memory and speed", "Accepted for the seed's notebooks; only False works.", resume="free"
    )

    # Checkpoints and logs
    save_steps: StepsOrNone = _knob(
        0,
        "Checkpoints and logs",
        "Save a checkpoint every so many steps (or epochs, see save_use_epochs) and at the end; 0: only when stopped "
        "and at the end.",
        resume="free",
    )
    save_use_epochs: bool = _knob(False, "Checkpoints and logs", "Count save_steps in epochs.", resume="free")
    checkpoints_total_limit: Few = _knob(
        2, "Checkpoints and logs", "Checkpoints kept; older ones are removed.", resume="free"
    )
    resume_from_checkpoint: Literal["latest", "no"] = _knob(
        "latest",
        "Checkpoints and logs",
        "latest: resume from the newest whole checkpoint, if there is one; the job has to be the same as far as the "
        "weights can tell, and may take more steps. no: start again.",
        resume="free",
    )
    logging_steps: Steps = _knob(10, "Checkpoints and logs", "Steps between two metric lines.", resume="free")
    validation_prompt: str | None = _knob(
        None,
        "Checkpoints and logs",
        "Draw this prompt before and after training, and the class prompt beside it; several are separated by `|`.",
        resume="free",
    )
    validation_steps: StepsOrNone = _knob(
        0,
        "Checkpoints and logs",
        "Draw validation_prompt every so many steps as well; 0: before and after training.",
        resume="free",
    )
    num_validation_images: Few = _knob(
        1,
        "Checkpoints and logs",
        "Pictures of each validation prompt, always with the same seeds.",
        resume="free",
    )
    validation_guidance_scale: Annotated[float, Ge(1)] = _knob(
        7.5,
        "Checkpoints and logs",
        "Guidance of the validation pictures.",
        resume="free",
    )
    fidelity_encoders: str | None = _knob(
        None,
        "Checkpoints and logs",
        "Measure how well the subject was learned, and what that cost, with these encoders: "
        "`dino=facebook/dinov2-base clip=openai/clip-vit-large-patch14`, one of them, or `judge` for the toybox model.",
        resume="free",
    )
    select_best: bool = _knob(
        False,
        "Checkpoints and logs",
        "Export the best of the kept checkpoints and the last state, as measured with fidelity_encoders.",
        resume="free",
    )

    @property
    def architecture(self) -> Architecture:
        """Of the base model, with ``auto`` resolved: by what lies at its path now, or by its name."""
        if self.base_architecture == "auto":
            return find_architecture(self.pretrained_model_name_or_path)
        return self.base_architecture

    def fit_to_base(self) -> Hyperparameters:
        """Takes the base model's own resolution, where none is asked for."""
        if "resolution" not in self.model_fields_set:
            object.__setattr__(self, "resolution", RESOLUTIONS[self.architecture])  # as little explicit as a default
        return self

    _fit_to_base = model_validator(mode="after")(fit_to_base)

    @property
    def s3_options(self) -> S3Options:
        """How the job writes to S3."""
        return S3Options(
            kms_key=self.s3_kms_key_id,
            acl=self.s3_acl,
            tags=dict(_tags(self.s3_tags)) if self.s3_tags else {},
            storage_class=self.s3_storage_class,
            requester_pays=self.s3_requester_pays,
            encryption=self.s3_encryption,
        )

    @property
    def upload_target(self) -> str | None:
        """Where the job itself uploads the model to; None where that is left to SageMaker."""
        return self.manual_upload_model_path if self.output_mode in ("auto", "direct") else None

    @property
    def prior_preservation(self) -> bool:
        """Whether class images are trained on, with ``auto`` resolved."""
        if self.with_prior_preservation == "auto":
            return self.class_prompt is not None or any(c.class_prompt for c in self.inline_concepts)
        return self.with_prior_preservation

    @property
    def buckets(self) -> bool:
        """Whether pictures are trained in shapes of their own, with ``auto`` resolved."""
        return not self.center_crop if self.aspect_ratio_buckets == "auto" else self.aspect_ratio_buckets

    @property
    def inline_concepts(self) -> tuple[Concept, ...]:
        """The concepts given as JSON; empty where ``concepts_list`` is a path or is left out."""
        return self.concepts_list if isinstance(self.concepts_list, tuple) else ()

    @classmethod
    def parse(
        cls,
        raw: Mapping[str, object],
        *,
        dataset_info: Callable[[str], Mapping[str, str]] = lambda instance_data_dir: {},
    ) -> Hyperparameters:
        """Reads hyperparameters as SageMaker, an SDK, a command line or Python code give them.

        Args:
            raw: names to values. Strings are decoded (``"False"``, ``"\\"512\\""``, ``photo\\\\ of\\\\ zwx``);
                keys of the platform (see :func:`~dreambooth_sm.knobs.decode.platform_keys`) are left out.
            dataset_info: gives the prompts that lie beside the pictures of ``instance_data_dir``; they serve where
                ``raw`` names none.

        Raises:
            UserError: with every problem of the input: unknown names (and the nearest known ones), wrong types,
                values out of range, values that can't work together.
        """
        problems: list[str] = []
        strangers: list[str] = []
        values: dict[str, object] = {}
        origins: dict[str, str] = {}
        refused: set[str] = set()
        own = {key: value for key, value in raw.items() if not PLATFORM_KEY.fullmatch(key)}
        for key, value in own.items():
            name = ALIASES.get(key, key)
            field = cls.model_fields.get(name)
            if field is None:
                strangers.append(key)
                continue
            decoded = decode(name, value, field)
            if name in values and values[name] != decoded:
                problems.append(f"{key} and {origins[name]} mean the same and have different values; keep one")
                continue
            if not all(is_text(text) for text in texts(decoded)):
                problems.append(f"{key}: {short(decoded)} holds characters that are no text; write it anew")
                refused.add(name)
                continue
            values[name] = decoded
            origins[name] = key
        known = [*cls.model_fields, *ALIASES]
        problems += [unknown(key, known) for key in strangers[:_MOST_UNKNOWN]]
        if len(strangers) > _MOST_UNKNOWN:
            problems.append(f"{len(strangers) - _MOST_UNKNOWN} more unknown hyperparameters")
        try:
            beside = dataset_info(str(values.get("instance_data_dir", DEFAULT_INSTANCE_DATA_DIR)))
            values |= {name: text for name, text in beside.items() if values.get(name) is None}
        except UserError as error:
            problems += error.problems
        try:
            parsed = cls.model_validate(values)
        except ValidationError as error:
            refused |= {str(detail["loc"][0]) for detail in error.errors()}
            problems += readable(error, cls, values)
            # What the valid values say about each other is worth knowing at once as well.
            parsed = cls.model_validate({name: value for name, value in values.items() if name not in refused})
        problems += [conflict.text for conflict in _conflicts(parsed) if refused.isdisjoint(conflict.names)]
        if problems:
            raise UserError(problems)
        return parsed

    @classmethod
    def parse_arguments(cls, arguments: Sequence[str]) -> Hyperparameters:
        """Reads ``--key value`` (or ``--key=value``) arguments; a bare ``--key`` means true.

        Words up to the next ``--key`` belong to one value, so that an unquoted prompt survives.
        """
        return cls.parse(split_arguments(arguments))

    def to_sagemaker(self) -> dict[str, str]:
        """The values that were set explicitly, each encoded as the one string that every SDK passes through."""
        explicit = self.model_dump(include=self.model_fields_set, mode="json")
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in explicit.items()}


def _tags(text: str) -> list[tuple[str, str]]:
    """``a=1,b=2`` as pairs.

    Raises:
        ValueError: for anything that S3 would refuse.
    """
    items = [item.partition("=") for item in text.split(",")]
    pairs = [(name.strip(), value.strip()) for name, _, value in items]
    names = [name for name, _ in pairs]
    allowed = all(
        re.fullmatch(r"[\w\s+\-=._:/@]{1,128}", name) and re.fullmatch(r"[\w\s+\-=._:/@]{0,256}", value)
        for name, value in pairs
    )
    if not allowed or len(set(names)) < len(names) or len(pairs) > 10 or any(n.startswith("aws:") for n in names):
        raise ValueError(text)
    return pairs


@dataclass(frozen=True)
class _Conflict:
    """Values that can't work, or not together.

    Attributes:
        names: of the knobs whose values were looked at.
    """

    names: tuple[str, ...]
    text: str


def _conflicts(h: Hyperparameters) -> list[_Conflict]:
    """Values that are each fine by their type and can't work, or not together."""
    problems: list[_Conflict] = []

    def check(broken: bool, text: str, *names: str) -> None:
        if broken:
            problems.append(_Conflict(names, text))

    concepts = h.inline_concepts
    check(
        h.concepts_list is None and not h.instance_prompt,
        'instance_prompt is missing; write the prompt of your subject with a rare token, such as "photo of zwx toy"',
        "instance_prompt",
        "concepts_list",
    )
    check(
        any(FILEWORDS in prompt for prompt in (h.class_prompt, *(c.class_prompt for c in concepts)) if prompt),
        f"class_prompt: {FILEWORDS} stands for the caption of a picture of the subject; leave it out",
        "class_prompt",
        "concepts_list",
    )
    check(
        h.with_prior_preservation is True and h.concepts_list is None and not h.class_prompt,
        "with_prior_preservation=true needs class_prompt; write the prompt of the class, such as "
        '"photo of a toy", or set with_prior_preservation=false',
        "class_prompt",
        "concepts_list",
        "with_prior_preservation",
    )
    check(
        isinstance(h.concepts_list, tuple) and not concepts,
        "concepts_list is empty; name at least one concept or leave it out",
        "concepts_list",
    )
    check(
        isinstance(h.concepts_list, str) and h.concepts_list.startswith("["),
        f"concepts_list: {short(h.concepts_list)} is no valid JSON; write a JSON list of "
        f"{{{', '.join(Concept.model_fields)}}}, or the path of a file that holds one",
        "concepts_list",
    )
    for number, concept in enumerate(concepts):
        check(
            not (concept.instance_prompt or h.instance_prompt),
            f"concepts_list: concept {number} has no instance_prompt",
            "instance_prompt",
            "concepts_list",
        )
        check(
            h.prior_preservation and not (concept.class_prompt or h.class_prompt),
            f"concepts_list: concept {number} has no class_prompt, which prior preservation needs",
            "class_prompt",
            "concepts_list",
            "with_prior_preservation",
        )
    check(
        h.instance_prompt is not None and h.instance_prompt == h.class_prompt,
        "instance_prompt and class_prompt are the same; the instance prompt needs a rare token, such as zwx",
        "instance_prompt",
        "class_prompt",
    )
    check(
        h.output_mode == "direct" and h.manual_upload_model_path is None,
        "output_mode=direct needs manual_upload_model_path; write s3://bucket/prefix there, or leave output_mode out",
        "manual_upload_model_path",
        "output_mode",
    )
    check(
        h.output_mode in ("uncompressed", "archive") and h.manual_upload_model_path is not None,
        f"output_mode={h.output_mode} leaves the upload to SageMaker; leave manual_upload_model_path out, or set "
        "output_mode=direct",
        "manual_upload_model_path",
        "output_mode",
    )
    check(
        h.s3_encryption == "AES256" and h.s3_kms_key_id is not None,
        "s3_encryption=AES256 encrypts with S3's own keys; leave s3_kms_key_id out, or set s3_encryption=aws:kms",
    )
    if h.s3_tags is not None:
        try:
            _tags(h.s3_tags)
        except ValueError:
            text = f"s3_tags: {short(h.s3_tags)} is not valid; write at most 10 different tags as team=toys,stage=test"
            problems.append(_Conflict(("s3_tags",), text))
    check(
        h.s3_endpoint_url is not None and not re.match(r"https?://[^/\s]+", h.s3_endpoint_url),
        f"s3_endpoint_url: {short(h.s3_endpoint_url)} is no address; write https://host:port",
        "s3_endpoint_url",
    )
    check(
        h.s3_endpoint_url is not None and has_userinfo(h.s3_endpoint_url),
        "s3_endpoint_url holds a user's name or password, which job descriptions and logs would show; write "
        "https://host:port, and give credentials by the job's role or as AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY",
        "s3_endpoint_url",
    )
    for name in ("pretrained_model_name_or_path", "pretrained_vae_name_or_path"):
        if not _may_be_model(model := getattr(h, name) or TOYBOX):
            near = near_name(model.lower(), [TOYBOX]) if name == "pretrained_model_name_or_path" else None
            hint = f"did you mean {near}?" if near else "write owner/name, s3://bucket/prefix or an absolute path"
            text = f"{name}: {short(model)} is neither a path that exists nor a model hub's id; {hint}"
            problems.append(_Conflict((name,), text))
    nearest = max(64, round(h.resolution / 8) * 8)
    check(h.resolution % 8 != 0, f"resolution={h.resolution} is no multiple of 8; write {nearest}", "resolution")
    check(
        h.use_lora, "use_lora=true: this job trains the full model; leave use_lora out or set it to false", "use_lora"
    )
    check(
        h.use_cpu and h.mixed_precision == "fp16",
        "use_cpu=true can't train in fp16; set mixed_precision to no, bf16 or auto",
        "mixed_precision",
        "use_cpu",
    )
    check(
        h.use_cpu and h.attention in ("xformers", "flash_attention"),
        f"use_cpu=true can't run attention={h.attention}, which needs a GPU; set attention to default or auto",
        "attention",
        "use_cpu",
    )
    check(
        h.use_cpu and h.use_8bit_adam is True,
        "use_cpu=true can't run use_8bit_adam=true, which needs a GPU; set use_8bit_adam to false or auto",
        "use_8bit_adam",
        "use_cpu",
    )
    check(
        h.use_8bit_adam is True and h.optimizer != "auto",
        f"use_8bit_adam=true and optimizer={h.optimizer} are two optimizers; set one of them to auto",
        "optimizer",
        "use_8bit_adam",
    )
    check(
        h.max_train_steps is not None and h.lr_warmup_steps > h.max_train_steps,
        f"lr_warmup_steps={h.lr_warmup_steps} is more than max_train_steps={h.max_train_steps}; "
        "the learning rate would never reach its value",
        "max_train_steps",
        "lr_warmup_steps",
    )
    check(
        h.lr_scheduler == "constant" and h.lr_warmup_steps > 0,
        "lr_scheduler=constant has no warm-up; write constant_with_warmup, or set lr_warmup_steps to 0",
        "lr_scheduler",
        "lr_warmup_steps",
    )
    check(
        h.validation_steps > 0 and h.validation_prompt is None,
        f"validation_steps={h.validation_steps} draws nothing without validation_prompt; write a prompt, such as "
        '"photo of zwx toy on the beach"',
        "validation_prompt",
        "validation_steps",
    )
    check(
        h.select_best and h.fidelity_encoders is None,
        "select_best=true needs fidelity_encoders to measure with; write fidelity_encoders=dino=facebook/dinov2-base",
        "fidelity_encoders",
        "select_best",
    )
    check(
        h.select_best and h.save_steps == 0,
        "select_best=true chooses between checkpoints and save_steps=0 writes none; set save_steps, such as 100",
        "save_steps",
        "select_best",
    )
    check(
        h.fidelity_encoders is not None and not _ENCODERS.fullmatch(h.fidelity_encoders),
        f"fidelity_encoders: can't understand {h.fidelity_encoders!r}; write judge, or dino=MODEL clip=MODEL or one of "
        "them, hub ids or directories without blanks",
        "fidelity_encoders",
    )
    check(
        h.export != "diffusers" and not re.fullmatch(r"[^/\0]{1,200}", h.model_name),
        f"model_name={short(h.model_name)} names the file that export={h.export} writes, and can't be a file's name",
        "model_name",
        "export",
    )
    check(
        h.hf_token_secret is not None and h.hf_token_secret.startswith("hf_"),
        "hf_token_secret takes the name of a secret, and this looks like a token, which job descriptions would show; "
        "revoke it, store a new one in AWS Secrets Manager and write the secret's name",
        "hf_token_secret",
    )
    for name in ("manual_upload_model_path", "class_cache"):
        try:
            S3Uri.parse(getattr(h, name) or "s3://none")
        except UserError as error:
            problems.append(_Conflict((name,), f"{name}: {error}; write s3://bucket/prefix"))
    check(
        h.instance_data_dir.rstrip("/") == h.class_data_dir.rstrip("/"),
        f"instance_data_dir and class_data_dir are the same directory, {h.instance_data_dir}; give each its own",
        "instance_data_dir",
        "class_data_dir",
    )
    check(
        PurePosixPath(h.instance_data_dir).is_relative_to(h.models_path),
        f"models_path={h.models_path} holds instance_data_dir: SageMaker packs all that lies there with the model; "
        f"give the model a directory of its own, such as {DEFAULT_MODELS_PATH}",
        "models_path",
        "instance_data_dir",
    )
    check(
        PurePosixPath(h.pretrained_model_name_or_path) == PurePosixPath(h.models_path),
        f"models_path and pretrained_model_name_or_path are the same directory, {h.models_path}: the trained model "
        "would be written over the base model; give each its own",
        "pretrained_model_name_or_path",
        "models_path",
    )
    return problems


def _may_be_model(name: str) -> bool:
    """Whether a model can lie where ``name`` says: what only the network or the container knows, it may."""
    if name == TOYBOX or "://" in name or name.startswith(("/", ".", "~")):
        return True
    if _HUB_ID.fullmatch(name) and not re.search(r"\.\.|--|(\.git|[.-])(/|$)", name):
        return True
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


if __name__ == "__main__":
    print(markdown_table(Hyperparameters))
