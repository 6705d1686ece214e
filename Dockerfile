# syntax=docker/dockerfile:1
# A small image: no pip, no compiler, no shell scripts; it runs as uid 10001 on a read-only root, and only /state is written.
#
#   docker build -t genesis-gateway .
#   docker run --read-only -v gateway-state:/state genesis-gateway
#
# As a sidecar it listens on the loopback of the pod it shares. To publish a port instead, set GATEWAY_DATA=0.0.0.0:8080
# and add keys: off loopback the gateway refuses to start without them.

ARG PYTHON_VERSION=3.13

FROM python:${PYTHON_VERSION}-slim AS builder
# image: no litellm. run: litellm and all it needs, 290 MB more, for upstreams that go through it.
ARG LOCK=image
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /src

# The locks come first, so that this layer is rebuilt only when a version moves.
COPY deploy/lock/ deploy/lock/
RUN python -m venv --without-pip /venv \
 && pip --python /venv/bin/python install --only-binary=:all: --require-hashes -r "deploy/lock/${LOCK}.txt"

# Of litellm the image keeps the price list, which the gateway reads as data.
RUN pip download --no-deps --only-binary=:all: --require-hashes -r deploy/lock/prices.txt -d /tmp/prices \
 && python -m zipfile -e /tmp/prices/litellm-*.whl /tmp/prices/ \
 && prices="$(/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/litellm" \
 && mkdir -p "${prices}" \
 && cp /tmp/prices/litellm/model_prices_and_context_window_backup.json "${prices}/" \
 && rm -rf /tmp/prices

COPY pyproject.toml README.md LICENSE ./
COPY gateway/ gateway/
RUN pip --python /venv/bin/python install --no-deps --no-build-isolation . \
 && pip --python /venv/bin/python uninstall --yes flit-core


FROM python:${PYTHON_VERSION}-slim
LABEL org.opencontainers.image.title="Genesis Gateway" \
      org.opencontainers.image.description="A sidecar LLM gateway" \
      org.opencontainers.image.licenses="Apache-2.0"

# Every .pyc was compiled in the builder, so nothing needs to be written beside the code.
ENV PATH="/venv/bin:${PATH}" \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    GATEWAY_REPORTS=/state/reports

# The link lets the relative paths of config.toml (state/...) land on the volume.
RUN groupadd --gid 10001 gateway \
 && useradd --uid 10001 --gid gateway --no-create-home --home-dir /app --shell /usr/sbin/nologin gateway \
 && install --directory --owner=gateway --group=gateway /state /app \
 && ln -s /state /app/state

WORKDIR /app
COPY --from=builder /venv /venv
COPY config.toml ./
COPY policies/ policies/

# A number, so that a pod's runAsNonRoot can see that it is not root.
USER 10001:10001
VOLUME /state
EXPOSE 8080 9090
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=3s --start-period=5s --retries=3 CMD ["gateway", "ping"]
ENTRYPOINT ["gateway"]
CMD ["serve"]
