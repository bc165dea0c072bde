# Two images: `docker build --target cpu .`, and `--target cuda` for NVIDIA (see README.md).
FROM python:3.11-slim-bookworm AS base
# torch.compile and Triton build kernels with a compiler, also at run time. KubeRay's probes use wget.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 chat \
    && install --directory --owner chat /cache
WORKDIR /app
# The root may be read-only: what is written goes to the volume.
ENV SERVICE_CACHE_DIR=/cache/models \
    MODELSCOPE_CACHE=/cache/modelscope \
    VLLM_CACHE_ROOT=/cache/vllm \
    TRITON_CACHE_DIR=/cache/triton \
    XDG_CACHE_HOME=/cache \
    HOME=/cache \
    PATH=/app/.venv/bin:$PATH
EXPOSE 6006
ENTRYPOINT ["chat-service"]
CMD ["serve"]

FROM base AS sources
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/*
COPY Makefile pyproject.toml README.md LICENSE ./
COPY requirements requirements
COPY model_configs model_configs
COPY service service
# `--build-arg CLUSTER=yes` adds Ray.
ARG CLUSTER=

FROM sources AS installed-cuda
RUN make install ${CLUSTER:+.venv/installed-cluster} EXTRA=cuda

FROM sources AS installed-cpu
RUN make install ${CLUSTER:+.venv/installed-cluster} EXTRA=cpu

FROM base AS cuda
COPY --from=installed-cuda /app /app
USER 1000

FROM base AS cpu
COPY --from=installed-cpu /app /app
USER 1000
