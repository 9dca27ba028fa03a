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
from pathlib import PurePosixPath

from pydantic import ValidationError

from dreambooth_sm.errors import UserError
from dreambooth_sm.knobs.concepts import Concept
from dreambooth_sm.knobs.decode import PLATFORM_KEY, decode, split_arguments
from dreambooth_sm.knobs.docs import markdown_table
from dreambooth_sm.knobs.escapes import is_text, texts
from dreambooth_sm.knobs.memory import MemoryKnobs
from dreambooth_sm.knobs.messages import near_name, readable, short, unknown
from dreambooth_sm.knobs.model import may_be_model
from dreambooth_sm.knobs.output import DEFAULT_MODELS_PATH, read_tags
from dreambooth_sm.knobs.pictures import DEFAULT_INSTANCE_DATA_DIR, FILEWORDS
from dreambooth_sm.knobs.prior import PriorKnobs
from dreambooth_sm.knobs.training import TrainingKnobs
from dreambooth_sm.knobs.validation import ENCODERS, ValidationKnobs
from dreambooth_sm.printing import has_userinfo
from dreambooth_sm.storage import S3Uri
from dreambooth_sm.toybox import NAME as TOYBOX

# Other spellings that users of the seed have in their notebooks.
ALIASES = {"manul_upload_model_path": "manual_upload_model_path"}
# Unknown names that get a line of their own.
_MOST_UNKNOWN = 20


# pydantic lists the fields of the last base first.
class Hyperparameters(ValidationKnobs, MemoryKnobs, TrainingKnobs, PriorKnobs):
    """The hyperparameters of one DreamBooth job (Ruiz et al. 2023, "DreamBooth: Fine Tuning Text-to-Image
    Diffusion Models for Subject-Driven Generation").

    ``"auto"`` leaves a choice to the plan for the card; an explicit value always wins over the plan.
    """

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
            read_tags(h.s3_tags)
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
        if not may_be_model(model := getattr(h, name) or TOYBOX):
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
        h.fidelity_encoders is not None and not ENCODERS.fullmatch(h.fidelity_encoders),
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


if __name__ == "__main__":
    print(markdown_table(Hyperparameters))
