#!/bin/sh
# Serve this workspace from numbatch's container image: HTTP on port 23333, and the KServe v2 (Triton) protocol on it too.
#   IMAGE=numbatch PORT=23333 GPUS=all NUMBATCH_API_KEYS=... ./service_docker_up.sh [more flags of `serve api_server`]
set -eu
if [ -z "${NUMBATCH_API_KEYS:-}" ]; then
    echo "set NUMBATCH_API_KEYS: the container listens on every address, and without keys anybody could call" >&2
    exit 2
fi
here=$(cd -- "$(dirname -- "$0")" && pwd)
exec docker run --rm ${GPUS:+--gpus "$GPUS"} -p "${PORT:-23333}:23333" -v "$here:/workspace:ro" -e NUMBATCH_API_KEYS \
    "${IMAGE:-numbatch}" serve api_server /workspace --server-name 0.0.0.0 --server-port 23333 "$@"
