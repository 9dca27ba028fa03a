"""Knobs for what a hypernetwork looks like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from annotated_types import Ge, Le

from dreambooth_sm.knobs.declare import knob, rule
from dreambooth_sm.knobs.messages import short
from dreambooth_sm.knobs.output import OutputKnobs, can_be_a_files_name
from dreambooth_sm.knobs.training import TrainingKnobs

HYPERNETWORK = "hypernetwork"


class HypernetworkKnobs(TrainingKnobs, OutputKnobs):
    """The networks that a hypernetwork is made of."""

    group = "Hypernetwork"

    hypernetwork_width: Annotated[int, Ge(1), Le(8)] = knob(
        2, "Width of the hidden layers, as a multiple of the text encoder's.", methods=(HYPERNETWORK,)
    )
    hypernetwork_layers: Annotated[int, Ge(1), Le(4)] = knob(
        1, "Hidden layers of each network.", methods=(HYPERNETWORK,)
    )
    hypernetwork_activation: Literal["linear", "relu", "leakyrelu", "elu", "swish", "tanh", "sigmoid"] = knob(
        "relu",
        "What follows each hidden layer, by its name in WebUI (swish is Hardswish there).",
        methods=(HYPERNETWORK,),
    )

    @rule("method", "model_name")
    def _name_can_be_its_files(self) -> Iterator[str]:
        if self.method == HYPERNETWORK and not can_be_a_files_name(self.model_name):
            yield f"model_name={short(self.model_name)} names the hypernetwork's files, and can't be a file's name"
