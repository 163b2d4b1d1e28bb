# Stems over HTTP. CPU: docker build -t demucs-infer .
# GPU: docker build -t demucs-infer:cuda --build-arg TORCH=cu130 .
# Models inside, to run without a network: --build-arg MODELS="htdemucs htdemucs_ft"
# To pin the base by its digest: --build-arg BASE=python@sha256:...
ARG BASE=python:3.12.12-slim-bookworm

FROM ${BASE} AS build
ARG TORCH=cpu
ARG MODELS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_CONSTRAINT=/src/constraints.txt PIP_BUILD_CONSTRAINT=/src/constraints.txt
RUN python -m venv /opt/demucs
WORKDIR /src
COPY deploy/constraints.txt constraints.txt
# torch comes first and alone: the code changes more often than it does. Its index has no exact
# versions of other packages.
RUN /opt/demucs/bin/pip install --no-deps torch --index-url "https://download.pytorch.org/whl/${TORCH}" && \
    /opt/demucs/bin/pip install torch numpy
COPY pyproject.toml README.md LICENSE ./
COPY demucs_infer demucs_infer
RUN /opt/demucs/bin/pip install ".[serve,vorbis,soxr,redis,otel]" && /opt/demucs/bin/pip check
RUN mkdir -p /models && \
    if [ -n "${MODELS}" ]; then \
      DEMUCS_INFER_CACHE=/models /opt/demucs/bin/demucs-infer models pull ${MODELS}; \
    fi

FROM ${BASE}
LABEL org.opencontainers.image.title="demucs-infer" org.opencontainers.image.licenses="MIT"
RUN useradd --uid 10001 --create-home --home-dir /data demucs
COPY --from=build /opt/demucs /opt/demucs
COPY --from=build --chown=demucs:demucs /models /models
# Everything that is written lies in /data: the rest of the file system may be read-only.
ENV PATH=/opt/demucs/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    DEMUCS_INFER_CACHE=/models DEMUCS_INFER_DATA_DIR=/data DEMUCS_INFER_HOST=0.0.0.0 TMPDIR=/data \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# A number, as Kubernetes has to know that it is not root.
USER 10001
VOLUME /data
EXPOSE 8080
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 CMD ["python", "-c", \
  "import os, urllib.request as u; e = os.environ.get; u.urlopen('http://127.0.0.1:' + e('DEMUCS_INFER_PORT', e('AIP_HTTP_PORT', '8080')) + e('DEMUCS_INFER_BASE_PATH', '') + '/livez')"]
ENTRYPOINT ["demucs-infer"]
CMD ["serve"]
