"""The work of a family with tensors and modules: all that the rest of the job asks of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from dreambooth_sm.families.conditioning import Conditioning
from dreambooth_sm.families.facts import Facts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dreambooth_sm.objectives import Objective

# Width and height, or left and top, in pixels.
Pair = tuple[int, int]


class LossKnobs(Protocol):
    """The hyperparameters that objectives are made by."""

    @property
    def snr_gamma(self) -> float | None: ...

    @property
    def debiased_loss(self) -> bool: ...

    @property
    def time_sampling(self) -> str: ...

    @property
    def time_shift(self) -> float | str: ...

    @property
    def resolution(self) -> int: ...


class Family(Protocol):
    """One kind of model.

    A ``model`` is a :class:`~dreambooth_sm.models.PretrainedModel` or a pipeline: its parts are attributes.

    Attributes:
        facts: what is known without one.
    """

    @property
    def facts(self) -> Facts: ...

    def tokenize(
        self, model: Any, prompts: Sequence[str], *, max_tokens: int | None = 75, pad: bool = True
    ) -> dict[str, Tensor]:
        """Makes what the text encoders take of prompts, a row each, on the CPU.

        Args:
            max_tokens: longest prompt; None for no limit.
            pad: to the encoders' full length; otherwise to the longest prompt.

        Raises:
            UserError: for prompts that are too long.
        """

    def encode(self, model: Any, tokens: Mapping[str, Tensor]) -> Conditioning:
        """Encodes :meth:`tokenize`'s tensors, which are on the text encoders' device; with gradients where
        they are trained."""

    def extras(self, size: Pair, crop: Pair, target: Pair) -> Mapping[str, Sequence[float]]:
        """Lists what the denoiser is told of a picture, by name.

        Args:
            size: of the picture before it was scaled.
            crop: left and top edge of what is shown, in the scaled picture.
            target: size of what is shown.
        """

    def predict(self, denoiser: Any, noised: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's answer, of the shape of ``noised``.

        Args:
            times: as the objective tells them (:meth:`~dreambooth_sm.objectives.Objective.told`), and the sampler:
                ``(rows,)``, or one for all rows.
        """

    def sampler(self, model: Any, steps: int, size: Pair, device: torch.device) -> Any:
        """A scheduler of diffusers that pictures are drawn with, whatever the model comes with, before its first step.

        Args:
            size: of the pictures.
        """

    def guide(self, predicted: Tensor, without: Tensor, guidance: float) -> Tensor:
        """Classifier-free guidance (Ho and Salimans 2022): what is drawn with.

        Args:
            predicted, without: the denoiser's answers for the prompt, and for the empty one.
            guidance: 1 leaves it to the prompt's.
        """

    def objective(self, model: Any, h: LossKnobs) -> Objective:
        """Makes the objective that the model was trained with; its tensors are on the CPU."""

    def scale(self, vae: Any) -> Any:
        """What :meth:`normalise` needs of a VAE, which may be let go of then."""

    def normalise(self, scale: Any, latents: Tensor) -> Tensor:
        """Turns the VAE's latents into those that the denoiser is shown."""

    def denormalise(self, scale: Any, latents: Tensor) -> Tensor:
        """The inverse of :meth:`normalise`."""

    def vae_dtype(self, vae: Any) -> torch.dtype:
        """The smallest type that a VAE of such a configuration computes in."""
