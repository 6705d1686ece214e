# Everything a newcomer types. `make help` lists it.
#
# Set-up is a stamp file: a target that needs packages depends on .venv/.run or .venv/.dev and nothing is installed
# twice. The development lock is made with the run-time lock as its constraint, so the order never matters.

PYTHON ?= python3
BIN    := .venv/bin
ARGS   ?=
# One more than there are cores: a fifth of the tests' time is waiting for processes and sockets.
JOBS   ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
IMAGE  ?= genesis-gateway

# Where deploy/prometheus.sh puts what the machine does not have.
DEBIAN := .venv/debian
export PATH := $(PATH):$(CURDIR)/$(DEBIAN)/usr/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- set-up -----------------------------------------------------------------

.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.13" >&2; \
	  exit 1; }
	$(PYTHON) -m venv --clear .venv
	@touch $@

.venv/.run: .venv/.python deploy/lock/run.txt pyproject.toml
	$(PIP) install --require-hashes -r deploy/lock/run.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

.venv/.dev: .venv/.run deploy/lock/dev.txt
	$(PIP) install --require-hashes -r deploy/lock/dev.txt
	@touch $@

.venv/.prometheus: .venv/.python deploy/prometheus.sh
	@deploy/prometheus.sh $(DEBIAN)
	@touch $@

# --- use --------------------------------------------------------------------

.PHONY: run demo bench
run: .venv/.run ## start the gateway; without any key it serves the built-in simulator
	$(BIN)/gateway serve $(ARGS)

demo: .venv/.dev ## ask the 80 MT-bench questions as 200 users through the real openai SDK
	$(BIN)/gateway demo $(ARGS)

bench: .venv/.dev ## measure CPU per request beside a naive proxy and nginx
	$(BIN)/python -m bench $(ARGS)

# --- prove ------------------------------------------------------------------

.PHONY: check test cover failover caps rollout
check: .venv/.dev .venv/.prometheus ## lint, types, policies, Dockerfile, and Prometheus' rules where promtool is
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/gateway check
	$(BIN)/hadolint Dockerfile
	@if command -v promtool >/dev/null; then \
	  promtool check config prometheus/prometheus.yml && promtool test rules prometheus/tests/*.yml; \
	else echo "promtool is not on PATH, so prometheus/ was not checked"; fi

test: check ## check, then every test (ARGS="-k budget" picks some)
	$(BIN)/python -m pytest -n $(JOBS) --maxprocesses 4 --dist worksteal $(ARGS)

failover: .venv/.dev ## the field's sixteen faults through a real gateway, and the scorecard
	$(BIN)/python -m pytest tests/faults/test_sixteen.py --quiet $(ARGS)

caps: .venv/.dev ## 200 callers race for caps that hold ten, then an hour of real traffic against a cap
	$(BIN)/python -m pytest tests/money/test_race.py --quiet
	$(BIN)/python -m gateway.lab.azure $(ARGS)

rollout: .venv/.dev ## a week of users in minutes: good models climb, bad ones are taken back; the leader is killed
	$(BIN)/python -m gateway.lab.rollout_week $(ARGS)

cover: .venv/.dev .venv/.prometheus ## the tests with a coverage report
	$(BIN)/python -m pytest -n $(JOBS) --maxprocesses 4 --dist worksteal --cov --cov-report term $(ARGS)

# --- ship -------------------------------------------------------------------

COMPILE = $(BIN)/uv pip compile --quiet --no-config --universal --python-version 3.11 --generate-hashes \
          --fork-strategy fewest --no-header --no-emit-index-url --no-emit-find-links --no-annotate $(UPGRADE)

.PHONY: lock docker clean
lock: .venv/.dev ## remake deploy/lock (UPGRADE=--upgrade moves to the newest versions)
	$(COMPILE) pyproject.toml --group build --extra grpc --extra litellm --extra reports --output-file deploy/lock/run.txt
	$(COMPILE) pyproject.toml --group dev --extra grpc --extra litellm --extra reports --constraint deploy/lock/run.txt --output-file deploy/lock/dev.txt
	$(COMPILE) pyproject.toml --group build --constraint deploy/lock/run.txt --output-file deploy/lock/image.txt
	echo litellm | $(COMPILE) - --no-deps --constraint deploy/lock/run.txt --output-file deploy/lock/prices.txt

docker: ## build the image (needs a container engine)
	docker build --tag $(IMAGE) .

clean: ## remove what the other targets made; state/ and reports/ stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* dist build
	find gateway tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
