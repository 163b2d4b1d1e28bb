# Stems over HTTP. CPU: docker build -t demucs-infer .
# GPU: docker build -t demucs-infer:cuda --build-arg TORCH=cu130 .
# Models inside, to run without a network: --build-arg MODELS="htdemucs htdemucs_ft"
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG TORCH=cpu
ARG MODELS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/demucs
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
# torch comes first and alone: the code changes more often than it does.
RUN /opt/demucs/bin/pip install -c constraints.txt torch numpy --index-url "https://download.pytorch.org/whl/${TORCH}"
COPY demucs_infer demucs_infer
RUN /opt/demucs/bin/pip install -c constraints.txt ".[serve,vorbis,soxr]"
RUN mkdir -p /models && \
    if [ -n "${MODELS}" ]; then \
      DEMUCS_INFER_CACHE=/models /opt/demucs/bin/demucs-infer models pull ${MODELS}; \
    fi

FROM python:${PYTHON}-slim
LABEL org.opencontainers.image.title="demucs-infer" org.opencontainers.image.licenses="MIT"
RUN useradd --uid 10001 --create-home --home-dir /data demucs
COPY --from=build /opt/demucs /opt/demucs
COPY --from=build --chown=demucs:demucs /models /models
# Everything that is written lies in /data: the rest of the file system may be read-only.
ENV PATH=/opt/demucs/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    DEMUCS_INFER_CACHE=/models DEMUCS_INFER_DATA_DIR=/data DEMUCS_INFER_HOST=0.0.0.0 TMPDIR=/data
USER demucs
VOLUME /data
EXPOSE 8080
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 CMD ["python", "-c", \
  "import os, urllib.request as u; e = os.environ.get; u.urlopen('http://127.0.0.1:' + e('DEMUCS_INFER_PORT', e('AIP_HTTP_PORT', '8080')) + e('DEMUCS_INFER_BASE_PATH', '') + '/livez')"]
ENTRYPOINT ["demucs-infer"]
CMD ["serve"]
