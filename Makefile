# Every target makes or updates .venv first (tools/bootstrap.py); with nothing to do that takes a moment.
#
#   make demo [DEMO_ARGS=...]       draw images, run the model on them, write pictures to output/demo
#   make test [PYTEST_ARGS=...]     all tests; those for a GPU or TensorRT are skipped where there is none
#   make lint                       ruff check and ruff format --check
#
# Options of the environment, for every target; a change of one rebuilds what depends on it:
#   DETECTRON2=0.5|PATH|URL         0.5 from PyPI (default), a checkout, or a git URL such as
#                                   git+https://github.com/facebookresearch/detectron2.git@v0.6
#   DETECTRON2_NATIVE=1             compile that detectron2's C++/CUDA operators instead of a pure-Python wheel
#   TORCH=VERSION TORCHVISION=VERSION   another torch, with the torchvision made for it
#   PYTHON=python3.10               interpreter for the environment
#   VENV=/path                      where the environment goes

VENV ?= .venv
DETECTRON2 ?= 0.5
DETECTRON2_NATIVE ?=
TORCH ?=
TORCHVISION ?=
PYTHON ?=
DEMO_ARGS ?= --draw 4 --output output/demo
PYTEST_ARGS ?=
# A few processes help; each loads torch, so not one for every core of a large machine. 0: no extra process.
TEST_PROCESSES ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); [ "$$n" -gt 4 ] && n=4; echo $$n)

BIN := $(VENV)/bin
BOOTSTRAP = tools/bootstrap.py --venv "$(VENV)" --detectron2 "$(DETECTRON2)" \
	$(if $(filter-out 0,$(DETECTRON2_NATIVE)),--detectron2-native) \
	--torch "$(TORCH)" --torchvision "$(TORCHVISION)" --python "$(PYTHON)"

.PHONY: help setup demo test lint format lock clean distclean

help:
	@awk '!/^#/ { exit } { sub(/^# ?/, ""); print }' Makefile

setup:
	@command -v python3 >/dev/null || { \
	echo "python3 is not installed. On Debian or Ubuntu: apt-get install python3 python3-venv" >&2; exit 1; }
	@python3 $(BOOTSTRAP)

demo: setup
	$(BIN)/python tools/demo.py $(DEMO_ARGS)

test: setup
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadscope $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Needs one interpreter for each supported Python.
lock:
	python3 tools/update_lock.py $(or $(LOCK_PYTHONS),python3.10 python3.11 python3.12)

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv.log .venv.lock
