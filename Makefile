# Everything a newcomer types. `make demo` and `make test` set themselves up in .venv; once that is done, nothing
# here needs the network, root, a display or a GPU (but `make test-slow`, which installs the wheel afresh and fetches
# ComfyUI and, where root can, Chromium; what can't be had is skipped with the reason).
#
#   PYTHON=/path/to/python3.12   interpreter that makes .venv (default: the first of python3.13, 3.12, 3.11, python3
#                                that is 3.11 or newer)
#   VENV=.venv                   where the environment is
#   WORKERS=2                    processes for `make test`
#   OUTPUT=demo.png FRAMES=8     what `make demo` writes
#   COMFYUI=.comfyui             where ComfyUI is fetched to for its tests; COMFYUI_PATH=... names a checkout to test
#                                against instead
#   ARGS=...                     further flags for pytest, `lego demo` or the kitchen's training

SHELL    := /bin/bash
PYTHON   ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
VENV     ?= .venv
WORKERS  ?= 2
OUTPUT   ?= demo.png
FRAMES   ?= 8
COMFYUI  ?= .comfyui
ARGS     ?=

BIN      := $(VENV)/bin
READY    := $(VENV)/.ready
# With the oldest ComfyUI: its inner names, the nodes, the server. Not what needs the newest frontend or no ComfyUI.
OLDEST   := $(foreach name,adapter nodes memory server workflows,tests/comfy/test_$(name).py) -k "not real and not twenty"
EXTRAS   := app,dev,eval,kitchen,vision

export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-comfy comfy-pictures test-gpu check format kitchen kitchen-report

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## draw a contact sheet with the embedded checkpoint (demo.png)
	@$(BIN)/python -m lego_pipeline.cli demo --output $(OUTPUT) --frames $(FRAMES) $(ARGS)

test: check ## check, then every test that needs neither minutes nor a GPU
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile \
		-m "not slow and not gpu" $(ARGS)

# ComfyUI first: with it comes Chromium, in which the study's page and the app are clicked through as well.
test-slow: $(READY) ## the long tests: wheel in a fresh environment, whole scripts, kill loops, browser, ComfyUI
	-@$(MAKE) --no-print-directory $(COMFYUI)/.ready
	$(BIN)/python -m pytest -m "slow and not gpu" --ignore=tests/comfy --durations=10 $(ARGS)
	@if [ -f $(COMFYUI)/.ready ]; then $(MAKE) --no-print-directory test-comfy; \
		else $(BIN)/python -m pytest -m "slow and not gpu" tests/comfy; fi

test-comfy: $(COMFYUI)/.ready ## the nodes in ComfyUI: the newest tree known, and in short the oldest supported
	COMFYUI_PATH=$${COMFYUI_PATH:-$(abspath $(COMFYUI))/ComfyUI} LEGO_SCREENSHOTS=$(abspath $(COMFYUI))/screenshots \
		$(COMFYUI)/venv/bin/python -m pytest tests/comfy --durations=5
	COMFYUI_PATH=$(abspath $(COMFYUI))/ComfyUI-oldest $(COMFYUI)/venv/bin/python -m pytest $(OLDEST) --durations=5

comfy-pictures: $(COMFYUI)/.ready ## for a new embedded checkpoint: the workflows' thumbnails and docs/comfyui.jpg
	for run in "workflows.py -k workflow_runs" "browser.py -k opened_and_run"; do LEGO_WRITE_PICTURES=1 \
		COMFYUI_PATH=$(abspath $(COMFYUI))/ComfyUI $(COMFYUI)/venv/bin/python -m pytest tests/comfy/test_$$run || exit 1; done

test-gpu: $(READY) ## what only a GPU shows
	$(BIN)/python -m pytest -m gpu --durations=10 $(ARGS) || \
		{ code=$$?; [ $$code -eq 5 ] && echo "make: no test is marked gpu" || exit $$code; }

check: $(READY) ## formatting, lint, types, version and changelog agree
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ty check
	$(BIN)/python -m pytest -q --noconftest -p no:cacheprovider tests/test_version.py

format: $(READY) ## rewrite the sources as `make check` wants them
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

kitchen: $(READY) ## render and train it, run again to resume; `make kitchen ARGS=--export` replaces the checkpoint
	$(BIN)/python -m examples.kitchen.train $(ARGS)

kitchen-report: $(READY) ## tables and pictures of the embedded checkpoint, after a training its card
	$(BIN)/python -m examples.kitchen.report $(ARGS)

$(COMFYUI)/.ready: $(READY) tests/comfy/fetch_tree.py tests/comfy/requirements.txt
	$(BIN)/python tests/comfy/fetch_tree.py $(COMFYUI)

# A stamp, not the folder: an installation that was interrupted is taken up again.
$(READY): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "make: Python 3.11 or newer is needed and none of python3.13, python3.12, python3.11, python3 is;" \
			"install one or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; fi
	@echo "make: setting up $(VENV) with $(PYTHON) (once; torch is a large download)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@
