"""Facts of a family, as plan, launcher, documents and model cards need them before a download. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from dreambooth_sm.families.file_rules import FileRules


@dataclass(frozen=True)
class ModelFootprint:
    """The sizes that memory depends on, beside measured figures (``planning/measured``).

    Attributes:
        denoiser, text_encoder, vae: millions of parameters; of all text encoders together.
        text_width: of the text encoders' states, side by side.
        text_unread: those of the text encoders' layers that come after ``Facts.text_layers``.
        denoiser_coded, text_coded: those that can be kept in fewer bits (``base_weights``), of what is read.
        largest_coded: those of the largest layer of them, which is made whole while it computes.
        vae_bytes: width of the VAE's values while pictures are drawn.
        trains_text_encoder: whether its text encoders are trained beside the denoiser where nobody says otherwise.
    """

    denoiser: float
    text_encoder: float
    vae: float
    text_width: int
    text_unread: float = 0.0
    denoiser_coded: float = 0.0
    text_coded: float = 0.0
    largest_coded: float = 29.5
    vae_bytes: int = 2
    trains_text_encoder: bool = True

    @property
    def text_read(self) -> float:
        """Millions of parameters of the text encoders that compute."""
        return self.text_encoder - self.text_unread

    @property
    def has_language_model(self) -> bool:
        """Whether its text encoders take gigabytes, and other precautions than CLIP."""
        return self.text_encoder > 1000


@dataclass(frozen=True)
class AdaptedLayers:
    """Layers that adapters lie beside.

    Attributes:
        denoiser, text_encoder: the ends of their names, in the denoiser and in each text encoder.
        width, text_width: what goes into each and what comes out of it, added up over all of them; of convolutions,
            all that goes into one output.
    """

    denoiser: tuple[str, ...]
    text_encoder: tuple[str, ...]
    width: int
    text_width: int


@dataclass(frozen=True)
class Relative:
    """How a size compares with the one that the family's figures (``planning/measured``) are of, by arithmetic.

    Attributes:
        kept, recomputed: activations, all of them, and those that are kept where activations are recomputed.
        text: activations of the text encoders.
        cost: time of a step.
    """

    kept: float = 1.0
    recomputed: float = 1.0
    text: float = 1.0
    cost: float = 1.0


@dataclass(frozen=True)
class Size:
    """Models of a family that have more parameters than the one that its facts are of.

    Attributes:
        names: found in what their makers call them.
        config: of their denoiser, by which it is told from others.
        tensor: found in the header of their single files.
        footprint: their own.
        widths, text_widths: those of their :class:`AdaptedLayers`, by the choices of ``lora_targets``.
        relative: to the family's figures.
    """

    names: re.Pattern[str]
    config: Mapping[str, object]
    tensor: bytes
    footprint: ModelFootprint
    widths: Mapping[str, int]
    relative: Relative
    text_widths: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class MakersName:
    """What a model's makers, and ComfyUI, call layers of diffusers.

    Attributes:
        ours, theirs: diffusers' name, and that of its makers; with ``{}`` for the number of a block.
        rows: of the makers' layer, where that is several of diffusers' in one, such as queries, keys and values: how
            many rows are before these, how many these are, and how many all are, in units of the model; None: all.
    """

    ours: str
    theirs: str
    rows: tuple[int, int, int] | None = None

    def in_theirs(self, name: str) -> str | None:
        """The makers' name of a layer; None where it is another one."""
        return _translated(name, self.ours, self.theirs)

    def in_ours(self, name: str) -> str | None:
        """diffusers' name, from that of the makers; None where it is another one."""
        return _translated(name, self.theirs, self.ours)


def _translated(name: str, source: str, target: str) -> str | None:
    match = re.fullmatch(re.escape(source).replace(r"\{\}", r"(\d+)"), name)
    return target.format(*match.groups()) if match else None


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn where nobody says otherwise.

    Attributes:
        manner: solver and schedule, in words by which class images of earlier jobs are told apart.
        steps, class_steps: of pictures to look at, and of class images.
        batch: most class images at a time; more are not faster, and delay the end of a job that is to stop.
        guidance: classifier-free guidance of pictures to look at; 1 is none.
        guided: noise levels (sigma, from above to below) at which guidance is worth its second forward pass, in class
            images.
        told: the extra by which the denoiser is told the guidance, which then takes no second pass; None where it is
            classifier-free.
    """

    manner: str
    steps: int
    class_steps: int
    guidance: float
    guided: tuple[float, float]
    batch: int = 64
    told: str | None = None


@dataclass(frozen=True)
class Facts:
    """One family.

    Attributes:
        name: as the hyperparameter ``base_architecture`` says it, and of the file with its measured figures.
        title: what people call it.
        short, article: the same in a word, and what stands before that: "an SDXL base model".
        listed: how a list of all families calls it, after those before it.
        resolution: side of the pictures that it was trained on last, in pixels; what users expect where they name none.
        sizes: its larger models.
        relative: of the model's size.
        pipeline: the class of diffusers that draws with it.
        drawing: how that is done here.
        parts: its modules with weights, by their names in the pipeline; the denoiser comes first.
        config: of its denoiser, where what diffusers makes of one without any is of another size.
        tags: what the hub calls its models.
        methods: that can train it, each with the defaults of hyperparameters that are others for it.
        adapted: the layers that adapters may lie beside, by the choices of ``lora_targets``.
        licences: by the start of a base model's name, as the hub gives them.
        gates: licences that do not allow every use, each with what is found in the names of models under it.
        folder: of a pipeline directory, and ``tensor`` of a single file's header: those that no other family has. Of
            files that hold the denoiser alone it is a whole name.
        names: found in what makers call their models, and ``hint``, the one to tell users of.
        has_single_file: whether single files hold all parts of its models, and are written as well; those of other
            families hold the denoiser alone.
        adapters: the layout of adapters' files beside diffusers' own: ``kohya`` or ``comfyui``.
        flat_adapters: whether names in ComfyUI's layout are flat, as kohya's are: of a model's makers' names, diffusers
            reads some in no other form.
        scale_option: of its pipeline, for an adapter's strength.
        call_options: that its pipeline takes beside the prompt to be guided as pictures are here.
        makers_names: of layers that ComfyUI knows by other names than diffusers'.
        files: what its files have to be like; None: as those of Stable Diffusion.
        others: found in the names of models of other kinds that are called nearly as its own are.
        distilled: found in the names of models that were distilled into fewer steps, which training undoes.
        plain_text: text encoders that keep their bits where the others are read in fewer: they are small.
        overflows: whether fp16 is too small for its values, or was not tried, so that it needs a card with bf16;
            ``takes`` says why.
        multiple: of which pictures' sides have to be, in pixels.
        longest_prompt: in tokens; None where a hyperparameter says it.
        text_layers: how many of its language model's layers compute what is read of it; None for all.
        matches_flow: whether it is trained by flow matching.
        draws_latents: whether a picture's latents are drawn from what the VAE says of them; or else are its mean.
        takes: hyperparameters that have to have one of some values, each with these and the reason.
    """

    name: str
    title: str
    short: str
    article: str
    listed: str
    resolution: int
    footprint: ModelFootprint
    pipeline: str
    drawing: Drawing
    parts: tuple[str, ...]
    tags: tuple[str, ...]
    config: Mapping[str, object] = field(default_factory=dict)
    methods: Mapping[str, Mapping[str, object]] = field(default_factory=lambda: {"full": {}})
    adapted: Mapping[str, AdaptedLayers] = field(default_factory=dict)
    sizes: tuple[Size, ...] = ()
    relative: Relative = Relative()
    licences: Mapping[str, str] = field(default_factory=dict)
    gates: Mapping[str, re.Pattern[str]] = field(default_factory=dict)
    folder: str | None = None
    tensor: bytes | None = None
    names: re.Pattern[str] | None = None
    hint: str | None = None
    has_single_file: bool = True
    adapters: Literal["kohya", "comfyui"] = "kohya"
    flat_adapters: bool = False
    scale_option: str = "cross_attention_kwargs"
    call_options: Mapping[str, object] = field(default_factory=dict)
    makers_names: tuple[MakersName, ...] = ()
    files: FileRules | None = None
    others: re.Pattern[str] | None = None
    distilled: re.Pattern[str] | None = None
    plain_text: tuple[str, ...] = ()
    overflows: bool = False
    multiple: int = 8
    longest_prompt: int | None = None
    text_layers: int | None = None
    matches_flow: bool = False
    draws_latents: bool = True
    takes: Mapping[str, tuple[tuple[object, ...], str]] = field(default_factory=dict)

    @property
    def denoiser(self) -> str:
        """Name of the part that is trained."""
        return self.parts[0]

    def refusal_of(self, method: str) -> str | None:
        """Tells why a method does not train it, and which do; None where it does."""
        if method in self.methods:
            return None
        others = " or ".join(self.methods)
        return f"method={method}: the base model is {self.article} {self.short} model; set method to {others}"

    def of_size(self, size: Size) -> Facts:
        """Those of the family's models of a size."""
        adapted = {
            targets: replace(
                layers,
                width=size.widths[targets],
                text_width=size.text_widths.get(targets, layers.text_width),
            )
            for targets, layers in self.adapted.items()
        }
        return replace(self, footprint=size.footprint, adapted=adapted, relative=size.relative)
