#!/usr/bin/env bash
# Makes a base image like those for GPUs, on a machine without: Python and the CUDA build of torch that the package index
# has. Its name is the last line. Needs a Docker engine; and mmdebstrap (Debian's) where no image can be pulled.
set -euo pipefail
cd "$(dirname "$0")"
docker=${DOCKER:-docker}
torch=$(sed -n 's/^torch==//p' ../requirements/constraints.txt)
base=dreambooth-sm-cuda-base:torch-$torch
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if ! "$docker" image inspect "$base" >/dev/null 2>&1; then
  python=${PYTHON_IMAGE:-python:3.13-slim}
  if ! "$docker" image inspect "$python" >/dev/null 2>&1 && ! "$docker" pull --quiet "$python" >/dev/null 2>&1; then
    python=dreambooth-sm-python:trixie # Debian 13, whose Python is 3.13
    mmdebstrap --quiet --variant=minbase --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/doc/*' \
      --include=python3,python3-venv,ca-certificates trixie "$work/root.tar" >&2
    "$docker" import --change 'ENV LANG=C.UTF-8' "$work/root.tar" "$python" >/dev/null
    rm "$work/root.tar"
  fi
  # An index behind a company's own certificate is trusted as it is here.
  cp -L /etc/ssl/certs/ca-certificates.crt "$work" 2>/dev/null || touch "$work/ca-certificates.crt"
  cat >"$work/Dockerfile" <<'DOCKERFILE'
ARG PYTHON_IMAGE
FROM ${PYTHON_IMAGE}
COPY ca-certificates.crt /tmp/
RUN [ ! -s /tmp/ca-certificates.crt ] || cp /tmp/ca-certificates.crt /etc/ssl/certs/
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt PATH=/opt/venv/bin:$PATH
ARG PIP_INDEX_URL
ARG TORCH
RUN --mount=type=cache,target=/root/.cache/pip python3 -m venv /opt/venv && pip install "torch==$TORCH"
DOCKERFILE
  DOCKER_BUILDKIT=1 "$docker" build --network=host --build-arg=PYTHON_IMAGE="$python" --build-arg=TORCH="$torch" \
    ${PIP_INDEX_URL:+--build-arg=PIP_INDEX_URL="$PIP_INDEX_URL"} --tag="$base" "$work" >&2
fi
echo "$base"
