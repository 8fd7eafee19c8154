# Commands for a machine with nothing but Linux, Python 3.11, pip and make.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
CONFIG ?= serve/laptop.yaml
# `HOST=0.0.0.0 make serve` listens to all addresses, as a container has to; PORT and PUBLIC_URL take
# the place of what the file says, too.
HOST ?=
PORT ?=
PUBLIC_URL ?=
NAME ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

# Ray switches token authentication on and off by itself where this is not said.
RAY_AUTH_MODE ?= token
export RAY_AUTH_MODE
# Everything here talks to this machine; a proxy for the outside would be asked otherwise.
export NO_PROXY := $(NO_PROXY),127.0.0.1,localhost
export no_proxy := $(NO_PROXY)

.PHONY: serve test test-slow test-drill lint format bench clean

# Ours never block Serve's loop; on threads of their own each of a request's messages changes
# threads twice. Not of tests: a script without a loop cannot use a handle then.
serve: export RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD ?= 0
serve: export RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP ?= 0
# Proxies reach gateways by gRPC instead of actor calls: two milliseconds less. Serve's limit of four
# megabytes would make an error of every answer with more in it. The largest one has ten images of
# four megapixels in base64, 168 megabytes; more would only be what a stranger at that port may send.
serve: export RAY_SERVE_PROXY_USE_GRPC ?= 1
serve: export RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH ?= 268435456
# The addresses of your load balancers, whose X-Forwarded-For is believed: unless they are named,
# every caller without a key could be as many as it likes.
serve: export FORWARDED_ALLOW_IPS ?=
# Bodies of requests that offer another protocol are read, and headers without an end are not.
serve: export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH ?= flux_ray.gateway.proxy:read_with_h11
# A replica that fails three checks hangs, and does not hear that it is to end gracefully.
serve: export RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS ?= 1
# Proxies are the way in. One that died is replaced after three checks in vain, and then it has to start.
serve: export RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S ?= 0.25
serve: export RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S ?= 3
# On a busy machine one takes longer to start than three times the five seconds after which Serve
# would give up, and `serve run` with it.
serve: export RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S ?= 60
# A node counts as dead after five checks in vain, and what was on it is started elsewhere.
serve: export RAY_health_check_period_ms ?= 1000
# With an arena a thread, ranks on processors fetch their memory from the system again and again.
serve: export MALLOC_ARENA_MAX ?= 1
serve: $(VENV)/serve.stamp
	@$(BIN)/flux-ray serve $(CONFIG) $(addprefix --host ,$(HOST)) $(addprefix --port ,$(PORT)) \
	  $(addprefix --public-url ,$(PUBLIC_URL))

# In two processes, but for what starts a Ray: that takes both processors by itself.
IN_TWO := -n 2 --dist loadgroup --ignore tests/cluster

# Drills of groups that start slowly are both.
SLOW := "slow and not drill"

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest $(IN_TWO)
	$(BIN)/python -m pytest tests/cluster

test-slow: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m $(SLOW) $(IN_TWO)
	$(BIN)/python -m pytest -m $(SLOW) tests/cluster

test-drill: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m drill

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/bandit -q -c pyproject.toml -r flux_ray
	$(BIN)/pip-licenses > /dev/null
	$(BIN)/mypy

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/test.stamp
	@test -f tests/bench/$(NAME).py || { echo "no tests/bench/$(NAME).py: make bench NAME=x runs tests/bench/x.py"; exit 2; }
	$(BIN)/python tests/bench/$(NAME).py

clean:
	rm -rf $(VENV)

# torch first and pinned: left to the dependencies, pip may fetch another release, gigabytes of CUDA
# libraries with it, before it settles on this one. Which build of it comes is pip's own setting
# (PIP_EXTRA_INDEX_URL). Where Python comes without ensurepip, virtualenv makes the environment.
$(VENV)/torch.stamp:
	@echo "making $(VENV) with $(PYTHON), then torch: this takes a minute or two"
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV) \
	  && $(PYTHON) -m pip install -q --target $(VENV)/virtualenv virtualenv \
	  && PYTHONPATH=$(VENV)/virtualenv $(PYTHON) -m virtualenv -q $(VENV); }
	$(PIP) torch==2.13.0
	@touch $@

$(VENV)/serve.stamp: $(VENV)/torch.stamp pyproject.toml
	@echo "installing flux-ray: this takes a minute or two"
	$(PIP) -e .
	@touch $@

# BFL's own client wants an old Pillow, with holes in it; it does with ours.
$(VENV)/test.stamp: $(VENV)/torch.stamp pyproject.toml
	@echo "installing flux-ray and its test tools: this takes a minute or two"
	$(PIP) -e '.[test]'
	$(PIP) --no-deps blackforest==0.1.3
	@touch $(VENV)/serve.stamp $@
