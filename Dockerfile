# docker build -t bclip_fast .                                  for CPUs
# docker build -t bclip_fast:cuda --build-arg DEVICE=cuda .     for NVIDIA GPUs, with our CUDA kernels
# docker run --rm bclip_fast doctor
ARG DEVICE=cpu

FROM python:3.12-slim-trixie AS base-cpu
ENV TORCH_INDEX=https://download.pytorch.org/whl/cpu BCLIP_CUDA=0

# Ubuntu 24.04 has Python 3.12.
FROM nvidia/cuda:13.0.0-devel-ubuntu24.04 AS base-cuda
ENV TORCH_INDEX=https://download.pytorch.org/whl/cu130 BCLIP_CUDA=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# hadolint ignore=DL3006
FROM base-${DEVICE}
ARG TORCH=torch==2.13.0
ARG CUTLASS=nvidia-cutlass==4.2.0.0
ARG EXTRAS=train,eval,ingest,search,remote
# The distribution's newest packages: libjpeg-turbo and the compiler get security updates.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libjpeg-dev \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/bclip/bin:$PATH
# TORCH has the version of torch, and numpy's comes from our requirements.
# hadolint ignore=DL3013
RUN python3 -m venv /opt/bclip \
    && pip install --no-cache-dir "$TORCH" numpy --index-url "$TORCH_INDEX"
COPY . /src
# The CUDA kernels for Hopper need the headers of CUTLASS to compile.
RUN if [ "$BCLIP_CUDA" = 1 ]; then \
      pip install --no-cache-dir --no-deps --target /tmp/cutlass "$CUTLASS"; \
      export BCLIP_CUTLASS=/tmp/cutlass; \
    fi \
    && pip install --no-cache-dir "/src[$EXTRAS]" \
    && rm -rf /tmp/cutlass \
    && useradd --create-home --uid 10001 user
USER 10001
WORKDIR /home/user
ENTRYPOINT ["bclip"]
CMD ["--help"]
