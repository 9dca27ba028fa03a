# The training image. SageMaker runs it as `docker run IMAGE train`; without the argument it does the same.

# CUDA 12.8 serves every card from T4 to H100 and Blackwell; CUDA 13 would ask for newer host drivers.
ARG BASE_IMAGE=pytorch/pytorch:2.10.0-cuda12.8-cudnn9-runtime
FROM ${BASE_IMAGE} AS dependencies

# A mirror with /ubuntu or /debian below it.
ARG APT_MIRROR
# Triton compiles its launchers when a job runs; not every runtime image has the compiler and headers for that.
# hadolint ignore=DL3008
RUN command -v gcc >/dev/null || { \
        if [ -n "${APT_MIRROR:-}" ]; then \
            find /etc/apt -type f '(' -name '*.list' -o -name '*.sources' ')' -exec sed -i -E \
                "s#https?://(archive|security|deb)\.(ubuntu\.com|debian\.org)#${APT_MIRROR%/}#" '{}' +; \
        fi \
        && apt-get update \
        && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
        && rm -rf /var/lib/apt/lists/*; \
    }

# `optimizer=adamw8bit`.
ARG WITH_BITSANDBYTES=1
# `attention=xformers`. Its wheel fits one torch and CUDA: change requirements/xformers.in together with BASE_IMAGE.
ARG WITH_XFORMERS=0
# `report_to=mlflow`, `report_to=wandb`; TensorBoard is always there.
ARG WITH_MLFLOW=0
ARG WITH_WANDB=0
# A mirror of the package index. One with a password goes in as the build secret `pip.conf`, pip's own settings: build
# arguments can be read in the image's history.
ARG PIP_INDEX_URL
ARG PIP_TRUSTED_HOST
# The base's torch is a constraint, so no dependency can replace it; what would break a job breaks the build instead.
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,source=requirements,target=/mnt \
    --mount=type=secret,id=pip.conf \
    set -eu; \
    export PIP_CONFIG_FILE=/run/secrets/pip.conf; \
    base_torch() { python -c 'from importlib.metadata import version; print("torch==" + version("torch"))'; }; \
    base_torch >/root/base-torch.txt; \
    set -- --requirement /mnt/image.txt; \
    if [ "$WITH_BITSANDBYTES" = 1 ]; then set -- "$@" --requirement /mnt/bitsandbytes.txt; fi; \
    if [ "$WITH_XFORMERS" = 1 ]; then set -- "$@" --requirement /mnt/xformers.txt; fi; \
    if [ "$WITH_MLFLOW" = 1 ]; then set -- "$@" --requirement /mnt/mlflow.txt; fi; \
    if [ "$WITH_WANDB" = 1 ]; then set -- "$@" --requirement /mnt/wandb.txt; fi; \
    PIP_BREAK_SYSTEM_PACKAGES=1 python -m pip install --require-hashes --only-binary :all: \
        --constraint /root/base-torch.txt "$@"; \
    [ "$(base_torch)" = "$(cat /root/base-torch.txt)" ]; \
    python -c 'from diffusers import StableDiffusionPipeline; import torch.utils.tensorboard'; \
    if [ "$WITH_BITSANDBYTES" = 1 ]; then \
        python -c 'import ctypes, torch, bitsandbytes.cextension as b; from bitsandbytes.cuda_specs import CUDASpecs; \
cuda = torch.version.cuda; \
cuda and ctypes.CDLL(b.get_cuda_bnb_library_path(CUDASpecs((9, 0), cuda.replace(".", ""), tuple(map(int, cuda.split("."))))))'; \
    fi; \
    if [ "$WITH_XFORMERS" = 1 ]; then \
        python -c 'import torch, importlib.util as u; torch.ops.load_library(u.find_spec("xformers._C").origin)'; \
    fi; \
    if [ "$WITH_MLFLOW" = 1 ]; then python -c 'import mlflow, sagemaker_mlflow'; fi; \
    if [ "$WITH_WANDB" = 1 ]; then python -c 'import wandb'; fi; \
    rm -rf /root/base-torch.txt /tmp/*

# A base model in the image saves each job its download: a hub id, found by `pretrained_model_name_or_path`.
FROM dependencies AS base-model
ARG BASE_MODEL=""
ARG BASE_MODEL_REVISION=""
# A mirror of the hub.
ARG HF_ENDPOINT
WORKDIR /src
COPY dreambooth_sm/ dreambooth_sm/
# A change of our code runs this again; the model then comes from the builder's cache, and the image's layer stays as it
# was. A model that asks for a token finds it as the build secret `hf_token`.
RUN --mount=type=cache,target=/root/.cache/huggingface \
    --mount=type=secret,id=hf_token \
    mkdir -p /opt/base-models \
    && if [ -n "$BASE_MODEL" ]; then \
        HF_HOME=/root/.cache/huggingface HF_TOKEN_PATH=/run/secrets/hf_token \
        python -c 'import shutil, sys; from dreambooth_sm import sources; \
name, revision = sys.argv[1:]; \
shutil.copytree(sources.fetch(name, revision=revision or None), sources.BAKED / name)' \
        "$BASE_MODEL" "$BASE_MODEL_REVISION"; \
    fi \
    && chmod -R a+rX /opt/base-models

# Triton's kernels, compiled for all cards: the first step of a job would wait for them. Only what they are made of is
# copied, so that other changes leave this layer as it was.
FROM dependencies AS kernels
WORKDIR /src
COPY dreambooth_sm/__init__.py dreambooth_sm/quiet.py dreambooth_sm/runtime.py dreambooth_sm/
COPY dreambooth_sm/training/ dreambooth_sm/training/
RUN python -m dreambooth_sm.training.kernel_builds /opt/dreambooth-sm-kernels \
    && chmod -R a+rX /opt/dreambooth-sm-kernels

FROM dependencies
COPY --from=base-model /opt/base-models/ /opt/base-models/
COPY --from=kernels /opt/dreambooth-sm-kernels/ /opt/dreambooth-sm-kernels/

# Caches follow HOME into /tmp: with it as a volume, the job runs on a read-only root file system (`--read-only`).
# USER gives a `--user` that /etc/passwd does not know the name that PyTorch's compile cache asks for.
ENV HOME=/tmp \
    USER=dreambooth \
    HF_HUB_DISABLE_TELEMETRY=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPATH=/opt/dreambooth-sm \
    PYTHONUNBUFFERED=1
VOLUME ["/tmp"]

# Our code comes last: a change to it rebuilds nothing above. Readable to any `--user`, whatever the builder's umask.
WORKDIR /opt/dreambooth-sm
COPY --chmod=755 LICENSE ./
COPY --chmod=755 dreambooth_sm/ dreambooth_sm/
COPY --chmod=755 container/ container/
RUN python -m compileall -q .

# No USER: SageMaker starts the container as root and owns what it mounts at /opt/ml, where another user could not
# write its model. Everywhere else `docker run --user` works.
ENTRYPOINT ["python", "/opt/dreambooth-sm/container/train.py"]

ARG VERSION=unknown
ARG REVISION=unknown
# The tag that no other build has; the job's log and report name it.
ARG BUILD=""
ENV DREAMBOOTH_SM_BUILD=${BUILD}
LABEL org.opencontainers.image.title="dreambooth-sm" \
      org.opencontainers.image.description="DreamBooth fine-tuning of Stable Diffusion as a SageMaker training job" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
