# `make demo` and `make test` do everything on a fresh machine: Python >= 3.11 and a package index are all they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The two SageMaker SDKs can't be installed together: the tests run each in an environment of its own (280 MB, 20 s).
SDKS := .venv-sdk2/.installed .venv-sdk3/.installed
# MLflow's server and W&B, for the tests that tell them of a job (200 MB; torch is .venv's).
TRACKERS := .venv-trackers/.installed
# Older versions of diffusers, which have to read what is written here (140 MB each; torch is .venv's).
READERS := .venv-diffusers-0.27/.installed .venv-diffusers-0.32/.installed

# Python keeps what it has compiled of the project and the tests, also where its environment says otherwise.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo check test test-quickly test-cuda-image lint docs lock clean

demo: $(STAMP)
	$(BIN)/dreambooth-sm demo

# Three workers for two cores: tests also wait for servers, jobs and clocks.
test: $(STAMP) $(SDKS) $(READERS) $(TRACKERS)
	$(BIN)/python -m pytest -q -n 3 --dist worksteal tests

# An answer in three minutes: all but tests that start jobs and servers, and those that take more than about a second (slow).
# hypothesis tries fewer examples.
check: lint
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m 'not slow' --hypothesis-profile=check tests/unit tests/contract

# The image on the CUDA build of torch that the package index has: 2.7 GB to fetch, 6 GB of Docker's disk.
test-cuda-image: $(STAMP)
	base=$$(tests/cuda_base.sh) && CUDA_BASE_IMAGE=$$base $(BIN)/python -m pytest -q tests/integration/test_image_cuda.py

# What another Python, or another build of torch, could break: `make test-quickly VENV=.venv-3.13 PYTHON=python3.13`.
test-quickly: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal tests/unit tests/integration/test_demo.py

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# docs/ and the docstrings as a site, in site/; what leads nowhere is an error.
docs: $(VENV)/.docs-installed
	$(BIN)/python -m mkdocs build -q --strict

$(VENV)/.docs-installed: $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c requirements/constraints.txt -e '.[docs]'
	touch $@

# What the image installs, with the hashes of every file: change a .in file, then `make lock`.
lock: $(patsubst %,requirements/%.txt,image bitsandbytes xformers mlflow wandb)

requirements/%.txt: requirements/%.in | $(STAMP)
	$(BIN)/uv pip compile --quiet --no-deps --generate-hashes --no-annotate --custom-compile-command 'make lock' -o $@ $<

# torch first and by itself: a CPU build on the index or on disk is then not replaced by a dependency's choice.
$(STAMP): pyproject.toml requirements/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c requirements/constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c requirements/constraints.txt -e '.[train,serve,demo,dev]'
	touch $@

.venv-%/.installed: requirements/%.txt $(STAMP)
	$(PYTHON) -m venv --without-pip $(@D)
	$(BIN)/python -m pip --python $(@D)/bin/python install -q --disable-pip-version-check --no-deps -r $<
	touch $@

PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
define beside-venv
	$(BIN)/python -m venv --without-pip $(@D)
	$(BIN)/python -m pip --python $(@D)/bin/python install -q --disable-pip-version-check --no-deps -r $<
	$(BIN)/python $(PURELIB) > "$$($(@D)/bin/python $(PURELIB))/shared.pth"
	touch $@
endef

.venv-diffusers-%/.installed: requirements/diffusers-%.txt $(STAMP)
	$(beside-venv)

.venv-trackers/.installed: requirements/trackers.txt $(STAMP)
	$(beside-venv)

clean:
	rm -rf .venv .venv-* demo-output site build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
