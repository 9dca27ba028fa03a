"""How long GroupNorm with SiLU takes at the shapes of Stable Diffusion's UNets: the project's kernels beside torch's.

Images are in channels_last, and torch's answer is made so again, as the convolution behind it would. Each is
timed as a CUDA graph, forward and backward, with frozen weights. Prints one JSON line a shape, and a last one with the
sums over the norms of an SD 1.5 step:

- `ms`, `torch_ms`: median of replays.
- `gb_s`: bytes that have to move (x read and y written; x and the gradient read and one written), over `ms`.

    python -m benchmarks.group_norm
"""

from __future__ import annotations

import argparse
import json

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.optimizer_step import graph_ms
from dreambooth_sm.training.group_norm import group_norm

# (channels, side, with SiLU): how many of them SD 1.5's UNet has at 512 pixels.
SD15 = {
    (320, 64, True): 8, (320, 64, False): 5, (640, 64, True): 2, (960, 64, True): 1,
    (320, 32, True): 1, (640, 32, True): 6, (640, 32, False): 5, (960, 32, True): 1, (1280, 32, True): 1,
    (1920, 32, True): 1,
    (640, 16, True): 1, (1280, 16, True): 6, (1280, 16, False): 5, (1920, 16, True): 1, (2560, 16, True): 2,
    (1280, 8, True): 11, (1280, 8, False): 1, (2560, 8, True): 3,
}  # fmt: skip
# The largest of SDXL at 1,024 pixels.
SDXL = [(320, 128, True), (960, 128, True), (640, 64, False), (1920, 64, True), (2560, 32, True)]


def torch_norm(x: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
    y = F.group_norm(x, 32, weight, bias, 1e-5)
    return (F.silu(y) if silu else y).contiguous(memory_format=torch.channels_last)


def our_norm(x: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
    return group_norm(x, 32, weight, bias, 1e-5, silu=silu)


def measure(
    channels: int, side: int, silu: bool, batch: int, dtype: torch.dtype, repeats: int, trained: bool
) -> tuple[float, float]:
    """Milliseconds of ours and of torch's, forward and backward."""
    x, grad = (
        torch.randn(batch, channels, side, side, device="cuda").to(dtype, memory_format=torch.channels_last)
        for _ in range(2)
    )
    x.requires_grad_()
    weight, bias = (torch.randn(channels, device="cuda").to(dtype).requires_grad_(trained) for _ in range(2))
    wanted = [x, weight, bias] if trained else [x]
    times = []
    for norm in (our_norm, torch_norm):

        def step(norm: object = norm) -> object:
            assert callable(norm)
            # Ten, for a launch is a good part of one.
            return [torch.autograd.grad(norm(x, weight, bias, silu), wanted, grad) for _ in range(10)]

        times.append(graph_ms(step, lambda: None, repeats) / 10)
    return times[0], times[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--trained", action="store_true", help="gradients of weight and bias as well")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    total = [0.0, 0.0]
    for channels, side, silu in [*SD15, *SDXL]:
        ours, theirs = measure(channels, side, silu, args.batch, dtype, args.repeats, args.trained)
        count = SD15.get((channels, side, silu), 0)
        total = [total[0] + count * ours, total[1] + count * theirs]
        moved = 5 * args.batch * channels * side**2 * dtype.itemsize
        line = {"shape": [args.batch, channels, side, side], "silu": silu, "in_sd15": count}
        line |= {"ms": round(ours, 4), "torch_ms": round(theirs, 4), "gb_s": round(moved / ours / 1e6)}
        print(json.dumps(line), flush=True)
    print(json.dumps({"sd15_ms": round(total[0], 3), "sd15_torch_ms": round(total[1], 3)}))


if __name__ == "__main__":
    main()
