# make demo        train two small VQ-VAEs on photographs, draw and tabulate what they learned
# make test        all tests of a machine without a GPU
# make check       format, lint, types, then the tests
# make docs        build the documentation into build/site; no network, no warning
# make sanitize    the native CPU ops under AddressSanitizer, UBSan and ThreadSanitizer, in builds of their own
# make bench       time the ops beside their peers and all quantizers; writes bench/results, the figures of docs and the tables of README.md and docs
# make papers      train every row of the papers' tables on photographs; writes bench/results and docs/papers.md
# make bench-micro time every compiled op alone
# make wheel       dist/ with the sdist and the wheel made from it; check-wheel runs them where nothing but torch is
# make wheel-cuda  the same with CUDA bodies, on a machine that needs nvcc but no GPU and no CUDA torch
# make adoption    train other libraries' models on photographs before and after convert; writes docs/adoption.md
# make gpu         on a GPU machine: build, test, sanitize and measure there, with its own Python and no network

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
# optional: those of the extra bench of pyproject.toml that we are compared with
PEERS := faiss-cpu scikit-learn pykeops vector-quantize-pytorch diveq
SOURCES := pyproject.toml setup.py CMakeLists.txt vqkernels/__init__.py $(shell find csrc -type f)
FORMATTED := vqkernels python_tests bench docs README.md setup.py

# the interpreter of triton needs a process of its own
INTERPRETED := $(addprefix python_tests/test_,nearest_code.py grouped.py philox.py directional.py code_sums.py compile.py search_forms.py nearest_segment.py directional_range.py straight_through.py straight_through_rows.py)

# and one thread each
WORKERS := -n 2 --dist worksteal

.PHONY: demo test check check-all sanitize bench papers adoption bench-micro wheel check-wheel wheel-cuda gpu lint format native clean

demo: $(VENV)/demo
	$(PY) -m vqkernels demo

test: $(VENV)/test
	$(PY) -m pytest python_tests -m "not slow"
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest $(INTERPRETED) -m "not slow" $(WORKERS)

check: lint test

check-all: lint
	$(PY) -m pytest python_tests
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest $(INTERPRETED) $(WORKERS)

# quiet: the theme advertises its successor
.PHONY: docs
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict --site-dir build/site
	@echo "open build/site/index.html"

sanitize: $(VENV)/test
	$(PY) python_tests/sanitize.py

bench: $(VENV)/bench
	$(PY) bench/run.py --isas avx2 --fresh
	$(PY) bench/curves.py
	$(PY) bench/figures.py
	$(PY) bench/readme.py README.md docs/speed.md docs/memory.md
	$(PY) bench/quantizers.py
	$(PY) bench/family.py docs/quantizers.md docs/papers.md

papers: $(VENV)/bench
	$(PY) bench/papers.py
	$(PY) bench/family.py docs/quantizers.md docs/papers.md

adoption: $(VENV)/bench
	$(PIP) scikit-image
	$(PY) bench/adoption.py; missed=$$?; \
	$(PY) bench/adoption_report.py docs/adoption.md --figure docs/adoption.png --readme README.md && exit $$missed

bench-micro: $(VENV)/bench
	$(PY) -m pytest bench/micro --benchmark-max-time=0.3 --benchmark-min-rounds=3 \
		--benchmark-columns=min,median,iqr,rounds --benchmark-group-by=func --benchmark-sort=fullname

# the wheel is made from the sdist, so a file that the sdist lacks is missed here
wheel: $(VENV)/wheel
	rm -rf dist
	VQKERNELS_BUILD=cpu $(PY) -m build --no-isolation
	$(PY) -m twine check --strict dist/*

check-wheel: wheel
	$(PY) python_tests/packed.py dist

wheel-cuda: $(VENV)/test
	rm -rf dist/cuda
	VQKERNELS_BUILD=cuda-wheel $(PY) -m build --no-isolation --wheel --outdir dist/cuda
	$(PY) -m twine check --strict dist/cuda/*
	$(PY) python_tests/packed_cuda.py dist/cuda

gpu:
	$(PYTHON) bench/gpu.py

lint: $(VENV)/test
	$(PY) -m ruff check $(FORMATTED)
	$(PY) -m ruff format --check $(FORMATTED)
	$(PY) -m pyright --pythonpath $(PY)
	$(VENV)/bin/clang-format --dry-run --Werror $(shell find csrc -type f -not -name '*.txt')

format: $(VENV)/test
	$(PY) -m ruff check --fix $(FORMATTED)
	$(PY) -m ruff format $(FORMATTED)
	$(VENV)/bin/clang-format -i $(shell find csrc -type f -not -name '*.txt')

native: $(VENV)/native

clean:
	rm -rf build dist *.egg-info vqkernels/*.so

# torch first: a package that pulls it in would choose another build of it
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) setuptools wheel cmake ninja pybind11 numpy
	touch $@

$(VENV)/native: $(VENV)/torch $(SOURCES)
	$(PIP) --no-build-isolation --editable .
	touch $@

$(VENV)/docs: $(VENV)/torch $(SOURCES) mkdocs.yml
	$(PIP) --no-build-isolation --editable ".[train,docs]"
	touch $@

$(VENV)/demo: $(VENV)/torch $(SOURCES)
	$(PIP) --no-build-isolation --editable ".[train]"
	touch $@

$(VENV)/test: $(VENV)/torch $(SOURCES)
	$(PIP) --no-build-isolation --editable ".[train,docs,dev]"
	touch $@

$(VENV)/wheel: $(VENV)/torch
	$(PIP) build twine
	touch $@

# one by one: a peer that has no wheel here must not keep the others away, and the bench says who is missing
$(VENV)/bench: $(VENV)/torch $(SOURCES)
	$(PIP) --no-build-isolation --editable .
	$(PIP) pytest-benchmark matplotlib tyro
	for peer in $(PEERS); do $(PIP) $$peer || echo "$$peer could not be installed: the bench goes on without it"; done
	touch $@
