# numbatch in a container: Python and wheels, no compiler, no root. Kernels are compiled by numba at the first start.
#   docker build -t numbatch:0.1.0 .                            CPU
#   docker build --build-arg EXTRA=cuda -t numbatch:0.1.0-cuda .  NVIDIA cards; the host brings the driver and its container toolkit
# PIP_ARGS is handed to pip: another index, or PyTorch's index of CPU wheels, which makes the first image some gigabytes smaller.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS libraries
ARG EXTRA=""
ARG PIP_ARGS=""
WORKDIR /app
COPY pyproject.toml ./
# The libraries alone: this layer is made again only when pyproject.toml changes.
RUN python -m venv /venv \
 && python -c "import sys, tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *(r for e in sys.argv[1].split(',') if e for r in p['optional-dependencies'][e]), sep='\n')" "${EXTRA}" > requirements.txt \
 && /venv/bin/pip install --no-cache-dir --only-binary :all: ${PIP_ARGS} -r requirements.txt

FROM python:${PYTHON}-slim
RUN groupadd --gid 10001 numbatch \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/cache/numbatch --shell /usr/sbin/nologin numbatch \
 && install -d -o 10001 -g 10001 -m 0700 /var/cache/numbatch \
 && install -d -m 0755 /models
COPY --from=libraries /venv /venv
WORKDIR /app
COPY LICENSE README.md pyproject.toml server.py numbatch.py ./
COPY api ./api
COPY bench ./bench
COPY cli ./cli
COPY config ./config
COPY engine ./engine
COPY formats ./formats
COPY quant ./quant
COPY text ./text
# A container is reached by its address, so it must listen there: without keys (NUMBATCH_API_KEYS) the server refuses to start
# unless it is told --insecure. What is compiled or downloaded goes to the one folder that can be written.
ENV PATH=/venv/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/cache/numbatch \
    NUMBATCH_ENGINE_KERNEL_CACHE_DIR=/var/cache/numbatch/kernels \
    NUMBATCH_SERVER_SERVER_NAME=0.0.0.0 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /var/cache/numbatch
USER 10001:10001
EXPOSE 23333
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ.get('NUMBATCH_SERVER_SERVER_PORT', '23333') + '/health/live', timeout=4)"]
ENTRYPOINT ["python", "server.py"]
