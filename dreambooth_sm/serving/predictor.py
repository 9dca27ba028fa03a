"""What the denoiser says of all pictures that are drawn together; on a GPU by a CUDA graph of its kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dreambooth_sm.families import Conditioning
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.planning.serving import padded
from dreambooth_sm.serving.bank import AdapterUse, slot_tensors
from dreambooth_sm.serving.slots import AdapterSlots

# That are kept: of each shape and number of rows.
_MOST_RECORDINGS = 32


@dataclass(frozen=True, eq=False)
class Rows:
    """What stays the same of the rows of a batch while its pictures do.

    Attributes:
        conditioning: of each row.
        adapters: of each row.
    """

    conditioning: Conditioning
    adapters: Sequence[Sequence[AdapterUse]]


Compute = Callable[[], Tensor]
# Takes a computation; returns what does it again, and the tensor that then holds its result.
Recorder = Callable[[Compute], tuple[Callable[[], object], Tensor]]


class Predictor:
    """Asks a denoiser.

    Args:
        model: with its denoiser where it computes.
        slots: with the adapters beside its layers.
        make_recorder: makes what records steps, and once more whenever all recordings are let go of; None computes
            each step by itself.
    """

    def __init__(
        self, model: PretrainedModel, slots: AdapterSlots, make_recorder: Callable[[], Recorder] | None = None
    ) -> None:
        self._model, self._slots, self._make_recorder = model, slots, make_recorder
        self._dtype = model.denoiser.dtype  # diffusers looks at all modules for it
        self._recorder: Recorder | None = None
        self._recordings: dict[Hashable, _Recording] = {}
        self._changes = slots.changes

    @torch.no_grad()
    def __call__(self, noised: Tensor, times: Tensor, rows: Rows) -> Tensor:
        """The denoiser's answers.

        Args:
            noised: ``(rows, channels, height, width)``.
            times: of each row, float32.
            rows: the same object as in the step before, where nothing else has changed.

        Returns:
            float32, of the shape of ``noised``.
        """
        noised = noised.to(self._dtype)
        recording = self._recording(noised, times, rows)
        if recording is not None:
            return recording.replay(noised, times, rows)
        self._slots.rows.set(rows.adapters, noised.device)
        return self._ask(noised, times, rows.conditioning).float()

    def stop_recording(self) -> bool:
        """Computes each step by itself from now on, which takes less memory; False where it did before."""
        was_recording = self._make_recorder is not None
        self._make_recorder = None
        self._forget()
        return was_recording

    def _ask(self, noised: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        return self._model.family.predict(self._model.denoiser, noised, times, conditioning)

    def _recording(self, noised: Tensor, times: Tensor, rows: Rows) -> _Recording | None:
        """The recording of such a batch; None where it can't be recorded."""
        if self._make_recorder is None:
            return None
        told = {**rows.conditioning.text, **rows.conditioning.extras}
        shapes = tuple((name, value.shape[1:], value.dtype) for name, value in told.items())
        count = padded(len(noised))
        key = (count, noised.shape[1:], shapes, max(map(len, rows.adapters), default=0))
        size = count * noised[0].numel()
        if self._changes != self._slots.changes:  # recordings compute without the layers that are new
            self._forget()
        if key not in self._recordings:
            # The largest comes first: the others then fit into its memory.
            if len(self._recordings) == _MOST_RECORDINGS or any(each.size < size for each in self._recordings.values()):
                self._forget()
            self._recorder = self._recorder or self._make_recorder()
            try:
                self._recordings[key] = _Recording(self._recorder, self._slots, self._ask, noised, times, rows)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                print(f"warning: steps are drawn without a CUDA graph, which is slower ({reason})", file=sys.stderr)
                self.stop_recording()
                return None
        return self._recordings[key]

    def _forget(self) -> None:
        self._recordings, self._recorder = {}, None
        self._changes = self._slots.changes


class _Recording:
    """A step of batches of one shape, of as many rows or fewer: the rows beyond theirs are computed for nothing."""

    def __init__(
        self,
        record: Recorder,
        slots: AdapterSlots,
        ask: Callable[[Tensor, Tensor, Conditioning], Tensor],
        noised: Tensor,
        times: Tensor,
        rows: Rows,
    ) -> None:
        count = padded(len(noised))
        first = torch.arange(count, device=noised.device).clamp(max=len(noised) - 1)
        self._noised, self._times, self._conditioning = noised[first], times[first], rows.conditioning.of(first)
        slots.rows.set([*rows.adapters, *[rows.adapters[-1]] * (count - len(noised))], noised.device)
        self._adapters = slots.rows.slots, slots.rows.strengths
        self._rows = rows
        self.size = self._noised.numel()

        def compute() -> Tensor:
            slots.rows.slots, slots.rows.strengths = self._adapters
            return ask(self._noised, self._times, self._conditioning)

        self._replay, self._predicted = record(compute)

    def replay(self, noised: Tensor, times: Tensor, rows: Rows) -> Tensor:
        count = len(noised)
        self._noised[:count].copy_(noised)
        self._times[:count].copy_(times)
        if rows is not self._rows:
            self._tell(rows)
        self._replay()
        return self._predicted[:count].to(torch.float32, copy=True)

    def _tell(self, rows: Rows) -> None:
        count = len(rows.adapters)
        mine, new = self._conditioning, rows.conditioning
        for held, told in ((mine.text, new.text), (mine.extras, new.extras)):
            for name, value in told.items():
                held[name][:count].copy_(value)
        for place, uses in zip(self._adapters, slot_tensors(rows.adapters), strict=True):
            if place is not None and uses is not None:
                place[:, :count].copy_(uses)
        self._rows = rows


def recorder_for(device: torch.device) -> Callable[[], Recorder] | None:
    """What a predictor on a device records with."""
    return partial(cuda_graphs, device) if device.type == "cuda" else None


def cuda_graphs(device: torch.device) -> Recorder:
    """Records on a CUDA device. The graphs share their memory: only one of them runs at a time."""
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def record(compute: Compute) -> tuple[Callable[[], object], Tensor]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries choose their kernels in a first run
            compute()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what that run left; the graphs have memory of their own
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            result = compute()
        return graph.replay, result

    return record
