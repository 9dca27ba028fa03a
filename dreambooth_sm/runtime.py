"""Settings of the process that libraries read while they are loaded; imported with the package, so before torch.

What the user has set wins.
"""

import os

# Fragmentation costs small cards gigabytes.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
# OpenMP's threads spin while they wait: two processes that share a machine's cores would slow each other down tenfold.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
