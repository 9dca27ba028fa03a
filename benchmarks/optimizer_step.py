"""How long an optimizer step over the UNet of Stable Diffusion 1.5 takes (859.5 M parameters in 686 tensors).

Prints one JSON line a variant:

- `graph_ms`: median of replays of the step as a CUDA graph: the time on the device.
- `eager_ms`: median wall clock of an eager step, host included.
- `floor_ms`: bytes the step must move, over the bandwidth of a large copy measured first; `of_floor` is
  `floor_ms / graph_ms`, and `gb_s` the bandwidth the step reaches.

    python benchmarks/optimizer_step.py
    python benchmarks/optimizer_step.py --only bf16-stochastic-8 --elements 256 512 1024 --small 0 131072
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dreambooth_sm.training import adamw_blockwise
from dreambooth_sm.training.adamw_blockwise import BlockwiseAdamW

# (dtype, master, state bits, bytes a parameter: weight and moments read and written, gradient read).
BLOCKWISE = {
    "bf16-stochastic-8": (torch.bfloat16, "stochastic", 8, 10),
    "bf16-residual-8": (torch.bfloat16, "residual", 8, 14),
    "fp16-stochastic-8": (torch.float16, "stochastic", 8, 10),
    "fp16-residual-8": (torch.float16, "residual", 8, 14),
    "fp32-8": (torch.float32, "residual", 8, 16),
    "bf16-stochastic-4": (torch.bfloat16, "stochastic", 4, 8),
    "fp16-stochastic-4": (torch.float16, "stochastic", 4, 8),
}
OTHERS = {
    "torch-fused-fp32": (torch.float32, 28),
    "torch-fused-bf16": (torch.bfloat16, 14),
    "bitsandbytes-8bit-fp32": (torch.float32, 16),
}


def unet_shapes() -> list[tuple[int, ...]]:
    """Parameter shapes of the UNet; from diffusers, or, without it, the same counts written down."""
    try:
        from diffusers import UNet2DConditionModel
    except ImportError:
        return list(itertools.chain.from_iterable([shape] * count for shape, count in SHAPES.items()))
    with torch.device("meta"):
        return [tuple(p.shape) for p in UNet2DConditionModel(sample_size=64, cross_attention_dim=768).parameters()]


# fmt: off
SHAPES: dict[tuple[int, ...], int] = {
    (4,): 1, (320,): 103, (640,): 104, (960,): 4, (1280,): 162, (1920,): 4, (2560,): 15, (5120,): 5, (10240,): 6,
    (320, 320): 30, (320, 768): 10, (320, 1280): 10, (640, 640): 30, (640, 768): 10, (640, 1280): 5,
    (640, 2560): 5, (1280, 320): 1, (1280, 768): 12, (1280, 1280): 49, (1280, 5120): 6, (2560, 320): 5,
    (5120, 640): 5, (10240, 1280): 6,
    (4, 320, 3, 3): 1, (320, 4, 3, 3): 1, (320, 320, 1, 1): 10, (320, 640, 1, 1): 2, (320, 960, 1, 1): 1,
    (320, 320, 3, 3): 8, (320, 640, 3, 3): 2, (320, 960, 3, 3): 1, (640, 320, 1, 1): 1, (640, 640, 1, 1): 10,
    (640, 960, 1, 1): 1, (640, 1280, 1, 1): 1, (640, 1920, 1, 1): 1, (640, 320, 3, 3): 1, (640, 640, 3, 3): 8,
    (640, 960, 3, 3): 1, (640, 1280, 3, 3): 1, (640, 1920, 3, 3): 1, (1280, 640, 1, 1): 1, (1280, 1280, 1, 1): 12,
    (1280, 1920, 1, 1): 1, (1280, 2560, 1, 1): 5, (1280, 640, 3, 3): 1, (1280, 1280, 3, 3): 20,
    (1280, 1920, 3, 3): 1, (1280, 2560, 3, 3): 5,
}
# fmt: on


def parameters(dtype: torch.dtype, device: torch.device, limit: int | None) -> list[torch.nn.Parameter]:
    """Parameters with gradients, both random: zeros move and compute faster than real data."""
    params = []
    for shape in unet_shapes()[:limit]:
        param = torch.nn.Parameter((torch.randn(shape, device=device) * 0.02).to(dtype))
        param.grad = (torch.randn(shape, device=device) * 1e-4).to(dtype)
        params.append(param)
    return params


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def graph_ms(step: Callable[[], object], before: Callable[[], None], repeats: int) -> float:
    """Median device time of `step` as a graph; `before` runs outside it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            before()
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    before()
    with torch.cuda.graph(graph):
        step()
    times = []
    for _ in range(repeats):
        before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def eager_ms(step: Callable[[], object], before: Callable[[], None], device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        before()
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a pass over far more memory than any cache holds."""
    source = torch.empty((2**31 if device.type == "cuda" else 2**27) // 4, device=device).normal_()
    target = torch.empty_like(source)
    if device.type == "cuda":
        # Not a copy, which a graph hands to the slower copy engine.
        ms = graph_ms(lambda: torch.neg(source, out=target), lambda: None, 10)
    else:
        ms = eager_ms(lambda: torch.neg(source, out=target), lambda: None, device, 5)
    return 2 * source.nbytes / ms * 1e3


def measure(
    step: Callable[[], None],
    before: Callable[[], None],
    device: torch.device,
    moved: float,
    bandwidth: float,
    repeats: int,
) -> dict[str, float]:
    eager_ms(step, before, device, 2)
    result = {"eager_ms": eager_ms(step, before, device, max(3, repeats // 4))}
    if device.type == "cuda":
        result["graph_ms"] = graph_ms(step, before, repeats)
    best = result.get("graph_ms", result["eager_ms"])
    floor = moved / bandwidth * 1e3
    result |= {"gb_s": moved / best / 1e6, "floor_ms": floor, "of_floor": floor / best}
    return {name: round(value, 3) for name, value in result.items()}


def variants(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in [*BLOCKWISE, *OTHERS]:
        if args.only and name not in args.only:
            continue
        if name in OTHERS:
            yield name, {}
            continue
        for elements, small in itertools.product(args.elements or [None], args.small or [None]):
            for in_backward in (True, False) if args.clip else (True,):
                yield name, {"elements": elements, "small": small, "in_backward": in_backward}


def run(name: str, options: dict[str, Any], args: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    device = torch.device(args.device)
    if name in OTHERS:
        dtype, moved = OTHERS[name]
        params = parameters(dtype, device, args.limit)
        if name.startswith("bitsandbytes"):
            import bitsandbytes

            optimizer = bitsandbytes.optim.AdamW8bit(params, lr=2e-6)
        else:
            optimizer = torch.optim.AdamW(params, lr=2e-6, fused=True, capturable=device.type == "cuda")
        elements = sum(p.numel() for p in params)
        return measure(optimizer.step, lambda: None, device, elements * moved, bandwidth, args.repeats)

    dtype, master, bits, bytes_moved = BLOCKWISE[name]
    if options["small"] is not None:
        adamw_blockwise.SMALL_PARAMETER = options["small"]
    if options["elements"] is not None:
        from dreambooth_sm.training import adamw_blockwise_triton

        adamw_blockwise_triton.ELEMENTS_PER_PROGRAM = options["elements"]
    params = parameters(dtype, device, args.limit)
    elements = sum(p.numel() for p in params)
    optimizer = BlockwiseAdamW(
        params,
        master=master,  # type: ignore[arg-type]
        state_bits=bits,  # type: ignore[arg-type]
        update_in_backward=options["in_backward"],
        max_grad_norm=None if options["in_backward"] else 1.0,
    )
    grads = [p.grad for p in params]

    def step() -> None:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
            # What backward does once the gradient is complete.
            for hook in (param._post_accumulate_grad_hooks or {}).values():
                hook(param)
        optimizer.step()

    try:
        # Reading the gradients once more for their norm is part of the floor with clipping.
        traffic = (
            bytes_moved + 16 / optimizer._format.size + (0 if options["in_backward"] else params[0].element_size())
        )
        result = measure(step, optimizer.prepare_step, device, elements * traffic, bandwidth, args.repeats)
    finally:
        optimizer.close()
    return {k: v for k, v in options.items() if v is not None} | result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help=f"variants: {', '.join([*BLOCKWISE, *OTHERS])}")
    parser.add_argument("--elements", nargs="*", type=int, help="elements a program, to compare")
    parser.add_argument("--small", nargs="*", type=int, help="sizes below which parameters share a launch, to compare")
    parser.add_argument("--clip", action="store_true", help="also the step after backward, with clipping")
    parser.add_argument("--limit", type=int, help="only the first parameters")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    bandwidth = copy_bandwidth(torch.device(args.device))
    print(json.dumps({"variant": "copy", "gb_s": round(bandwidth / 1e9)}), flush=True)
    for name, options in variants(args):
        try:
            result = run(name, options, args, bandwidth)
        except ImportError as error:
            result = {"skipped": str(error)}
        print(json.dumps({"variant": name, **result}), flush=True)
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
