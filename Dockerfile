# The image that the manifests in launch/k8s name. For GPUs, the default:
#
#   docker build -t disttrain:latest .
#
# For machines without GPUs (TORCH_INDEX: an index of CPU wheels, which are far smaller; without it the usual wheel comes):
#
#   docker build --build-arg VARIANT=cpu --build-arg TORCH_INDEX=URL -t disttrain:cpu .
ARG VARIANT=cuda
ARG CUDA_BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
ARG CPU_BASE=python:3.12-slim

FROM ${CUDA_BASE} AS base-cuda

FROM ${CPU_BASE} AS base-cpu
ARG TORCH_INDEX=
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch>=2.11"

FROM base-${VARIANT}
WORKDIR /workspace
COPY pyproject.toml README.md LICENSE ./
COPY disttrain disttrain
# torch is there already; this adds what is missing beside it, and W&B, TensorBoard and Prometheus.
RUN pip install --no-cache-dir ".[wandb,tensorboard,prometheus]"
COPY configs configs
# No ENTRYPOINT: the manifests say the whole command, whose first process is torchrun and hears SIGTERM itself.
CMD ["disttrain", "--help"]
