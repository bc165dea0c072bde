# CPU: docker compose up. NVIDIA: docker compose build --build-arg EXTRA=cuda (see README.md).
FROM python:3.11-slim-bookworm

# torch.compile builds its CPU kernels with g++.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home chat \
    && install --directory --owner chat /app /cache

USER chat
WORKDIR /app
ARG EXTRA=cpu
ENV SERVICE_CACHE_DIR=/cache/models \
    MODELSCOPE_CACHE=/cache/modelscope \
    VLLM_CACHE_ROOT=/cache/vllm \
    PATH=/app/.venv/bin:$PATH
# First what changes rarely: the dependencies.
COPY --chown=chat Makefile pyproject.toml README.md LICENSE ./
COPY --chown=chat requirements requirements
COPY --chown=chat model_configs model_configs
COPY --chown=chat service service
RUN make install EXTRA=${EXTRA}

EXPOSE 6006
ENTRYPOINT ["chat-service"]
CMD ["serve"]
