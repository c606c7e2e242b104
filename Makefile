# `make` lists the targets. Everything is installed into .venv, in the versions of constraints.txt.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test check format bench-read bench-classify bench-ask bench-count bench-predict bench-resume bench-onnx train-read train-classify train-ask train-count fonts web-fonts clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F '\t' '{printf "make %-12s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## create .venv with regard in it

demo: $(VENV)/.installed ## read, classify, ask about and count in the sample images, and draw what was seen where
	@echo "Reading the images of samples/ with the model that comes with regard:"
	@echo
	@$(BIN)/regard read samples/*.png samples/*.jpg --draw demo/read
	@echo
	@echo "Classifying the images of samples/clothes/ with another:"
	@echo
	@$(BIN)/regard classify samples/clothes --draw demo/classify
	@echo
	@echo "Asking a third about the images of samples/shapes/, and its sibling about one of samples/scenes/:"
	@echo
	@$(BIN)/regard ask samples/shapes "what shape is in the image?" "what color is the shape?" "is there a circle?" --draw demo/ask
	@$(BIN)/regard ask samples/scenes/2.png "is the ring the same color as the circle?" "what shape is the green object to the left of the striped square?" "are there more gray things than green things?" --model query-conditioned-vqa-scenes --draw demo/ask
	@echo
	@echo "Counting with a fourth what the images of samples/counting/ hold:"
	@echo
	@$(BIN)/regard count samples/counting/3.png pencils turtles --draw demo/count
	@$(BIN)/regard count samples/counting/4.png helicopters --draw demo/count
	@echo
	@echo "demo/ holds a picture for each: the image, and beside it where the model looked and what it found there:"
	@find demo -name '*.png' | sort | sed 's/^/  /'
	@echo "Your own: $(BIN)/regard read IMAGE, $(BIN)/regard classify IMAGE, $(BIN)/regard ask IMAGE QUESTION, $(BIN)/regard count IMAGE THINGS    More: $(BIN)/regard --help"

test: $(VENV)/.installed-dev ## run the tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.installed-dev ## lint, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev ## put the code into its format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench-read: $(VENV)/.installed-bench ## measure reading beside other readers
	$(BIN)/python benchmarks/read.py $(BENCH_ARGS)

bench-classify: $(VENV)/.installed-bench $(VENV)/.installed-timm ## measure classifying beside timm's models, and without each of its parts
	$(BIN)/python benchmarks/classify.py peers $(BENCH_ARGS)
	$(BIN)/python benchmarks/classify.py ablations $(BENCH_ARGS)

bench-ask: $(VENV)/.installed-bench ## measure answering: what questions cost, what is known without the image, what the maps mean
	$(BIN)/python benchmarks/ask.py cost $(BENCH_ARGS)
	$(BIN)/python benchmarks/ask.py prior
	$(BIN)/python benchmarks/ask.py maps $(BENCH_ARGS)

bench-predict: $(VENV)/.installed-bench ## measure bulk inference: rows a second of one and two processes, and 20 kills
	$(BIN)/python benchmarks/predict.py throughput $(BENCH_ARGS)
	$(BIN)/python benchmarks/predict.py kills

bench-resume: $(VENV)/.installed-bench ## kill a training 20 times and compare how it ends
	$(BIN)/python benchmarks/resume.py $(BENCH_ARGS)

bench-onnx: $(VENV)/.installed-bench ## measure onnxruntime beside PyTorch
	$(BIN)/python benchmarks/export_onnx.py $(BENCH_ARGS)

COUNTER ?= sequential-attention-counting-tiny
bench-count: $(VENV)/.installed-bench ## measure counting: other counters, photographs, what an object costs, what each module buys
	$(BIN)/python benchmarks/count.py peers $(COUNTER) $(BENCH_ARGS)
	$(BIN)/python benchmarks/count.py photographs $(COUNTER) $(BENCH_ARGS)
	$(BIN)/python benchmarks/count.py cost $(COUNTER) $(BENCH_ARGS)
	$(BIN)/python benchmarks/count_ablations.py $(COUNTER)

train-count: $(VENV)/.installed-dev ## train sequential-attention-counting-tiny again, or go on where it stopped (TRAIN_ARGS: flags)
	OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 \
	  $(BIN)/torchrun --nproc_per_node 2 -m regard.train trainers/configs/sequential_attention_counting_tiny.yaml $(TRAIN_ARGS)

train-ask: $(VENV)/.installed-dev ## train query-conditioned-vqa-easy again, or go on where it stopped (TRAIN_ARGS: flags)
	OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 \
	  $(BIN)/torchrun --nproc_per_node 2 -m regard.train trainers/configs/query_conditioned_vqa_easy.yaml $(TRAIN_ARGS)

train-classify: $(VENV)/.installed-dev ## train qavit-tiny-fashion-mnist again, or go on where it stopped (TRAIN_ARGS: flags)
	OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 \
	  $(BIN)/torchrun --nproc_per_node 2 -m regard.train trainers/configs/qavit_tiny_fashion_mnist.yaml $(TRAIN_ARGS)

train-read: $(VENV)/.installed-dev ## train image-text-slot-5m again, or go on where it stopped (TRAIN_ARGS: flags)
	OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 \
	  $(BIN)/torchrun --nproc_per_node 2 -m regard.train trainers/configs/image_text_slot_5m.yaml $(TRAIN_ARGS)

fonts: ## install the fonts that training and evaluation draw with (Debian, as root)
	@if [ "$$(id -u)" = 0 ]; then \
	  apt-get update -q && xargs apt-get install -y -q --no-install-recommends < data/apt-packages.txt; \
	else \
	  echo "This needs root:"; \
	  echo "  sudo apt-get update && xargs sudo apt-get install -y --no-install-recommends < data/apt-packages.txt"; \
	  exit 1; \
	fi

web-fonts: $(VENV)/.installed-dev ## fetch the web fonts that ImageTextSlot is trained with, besides Debian's
	$(BIN)/python -m regard.data.web_fonts

clean: ## remove .venv, demo/ and what builds and tests leave behind
	rm -rf $(VENV) demo build dist .pytest_cache .ruff_cache src/*.egg-info
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# Debian keeps what `python3 -m venv` needs in a package of its own.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "regard needs Python 3.11 or newer. If there is one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -q && apt-get install -y -q --no-install-recommends python3-venv; \
	  else \
	    echo "Python cannot make virtual environments yet. On Debian: sudo apt-get install python3-venv"; exit 1; \
	  fi
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing regard into $(VENV) (some 3 GB, 6 with CUDA; a few minutes the first time) ..."
	$(PIP_INSTALL) --editable .
	@touch $@

# timm needs torchvision, and with that beside a CPU build of PyTorch transformers cannot be imported: a folder apart.
$(VENV)/.installed-timm: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/timm timm==1.0.31 torchvision==0.28.0
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(PIP_INSTALL) --editable ".[$*]"
	@touch $@
