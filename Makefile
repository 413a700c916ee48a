# One command each: demo, test, check, bench, abi, sanitize. `make help` lists them.
#
# FXSLIM_PYTHON=/path/to/python   use an existing environment that has torch and torchvision
# FXSLIM_TORCH_INDEX=URL          where torch and torchvision come from, always both (default: PyPI)
# FXSLIM_EXT=auto|cpu|cuda|off    which kernels are built

BASE_PYTHON ?= python3
VENV ?= .venv
ifdef FXSLIM_PYTHON
PYTHON := $(FXSLIM_PYTHON)
else
PYTHON := $(CURDIR)/$(VENV)/bin/python
endif
INDEX := $(if $(FXSLIM_TORCH_INDEX),--index-url $(FXSLIM_TORCH_INDEX))
PIP := $(PYTHON) -m pip --disable-pip-version-check
SOURCES := $(shell find fxslim_ext/csrc -type f)
VENV_READY := $(VENV)/ready
READY := build/ready-$(or $(FXSLIM_EXT),auto)

.PHONY: help setup demo test check bench zoo zoo-transformers zoo-timm quant-step quant-zoo onnx-zoo onnx-speed onnx-tasks memory scaling deploy-layers tasks pareto abi sanitize clean hessian

help:
	@grep -E '^[a-z-]+:.*## ' Makefile | sed 's/:.*## /\t/'

setup: $(READY)  ## environment with torch, torchvision and this project

$(VENV_READY):
	$(BASE_PYTHON) -m venv $(VENV)
	$(CURDIR)/$(VENV)/bin/python -m pip --disable-pip-version-check install -q --upgrade pip 'setuptools>=77'
	$(CURDIR)/$(VENV)/bin/python -m pip --disable-pip-version-check install -q $(INDEX) torch torchvision
	@touch $(VENV_READY)

$(READY): setup.py setup.cfg pyproject.toml $(SOURCES) $(if $(FXSLIM_PYTHON),,$(VENV_READY))
	$(PYTHON) -c "import torch, torchvision"
	FXSLIM_EXT=off $(PIP) install -q --no-build-isolation -e '.[dev,examples]'
	$(PYTHON) setup.py -q build_ext --inplace
	@mkdir -p build && rm -f build/ready-* && touch $(READY)

demo: setup  ## train, compress, export and compare a small model on real images
	$(PYTHON) examples/digits_demo.py

test: setup  ## all tests, with native kernels and again with the reference
	$(PYTHON) -m pytest
	FXSLIM_KERNELS=reference $(PYTHON) -m pytest tests/kernels tests/cli

check: setup  ## format, lint, types, floors, house rules
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(dir $(PYTHON))lint-imports
	$(PYTHON) -m pytest tests/house -q

bench: setup  ## kernels against torch's; writes a dated report
	$(PYTHON) -m benchmarks.kernels.run

zoo: setup  ## prune torchvision's models and prove each; writes a dated report
	$(PYTHON) -m benchmarks.models.zoo --effects
	$(PYTHON) -m benchmarks.models.zoo --effects --importance l2

zoo-transformers: setup  ## Hugging Face's models from small configs (first: pip install transformers); writes a dated report
	$(PYTHON) -m benchmarks.models.transformers_zoo

zoo-timm: setup  ## the same for 112 architectures of timm; first: pip install --no-deps timm huggingface_hub safetensors
	$(PYTHON) -m benchmarks.models.timm_zoo

quant-step: setup  ## a quantized training step, calibration and memory beside float and torch.ao; writes a dated report
	$(PYTHON) -m benchmarks.models.quant_step --report benchmarks/reports

quant-zoo: setup  ## quantize torchvision's classification models, train, save and load each; writes a dated report
	$(PYTHON) -m benchmarks.models.quant_zoo

onnx-zoo: setup  ## export torchvision's models and small transformers, run each in ONNX Runtime; writes a dated report
	$(PYTHON) -m benchmarks.models.onnx_zoo

onnx-speed: setup  ## exported files beside the float file and ONNX Runtime's own quantizer, one thread; writes a dated report
	$(PYTHON) -m benchmarks.models.onnx_speed

onnx-tasks: setup  ## files of trained networks beside the models and ONNX Runtime's own quantizer; resumes; writes a dated report
	$(PYTHON) -m benchmarks.tasks.exported

deploy-layers: setup  ## deployed layers beside float, and torch's integer kernels; writes a dated report
	$(PYTHON) -m benchmarks.models.deploy_layers --report benchmarks/reports

memory: setup  ## peak memory of tracing and pruning beside one forward; writes a dated report
	$(PYTHON) -m benchmarks.models.peak_memory

scaling: setup  ## CPU time as models grow to 1,000 layers; writes a dated report
	$(PYTHON) -m benchmarks.models.scaling

tasks: setup  ## rank pruning criteria, masks and quantization on a generated task (first: pip install torch-pruning==1.6.1); resumes; writes dated reports
	$(PYTHON) -m benchmarks.tasks.compare
	$(PYTHON) -m benchmarks.tasks.sparsity
	$(PYTHON) -m benchmarks.tasks.quantization

build/peers/ready:
	$(PIP) install -q --no-deps --target build/peers torch-pruning==1.6.1
	@touch $@

pareto: setup build/peers/ready  ## accuracy, latency and size of all combinations and of other tools; over an hour, resumes; writes a dated report
	PYTHONPATH=build/peers $(PYTHON) -m benchmarks.front.run

hessian: setup  ## pruning by second order beside the factors that it needs; writes a dated report
	$(PYTHON) -m benchmarks.models.hessian_speed

abi: setup  ## one library on torch 2.11 and on the newest: builds, op tests, symbol table
	$(PYTHON) fxslim_ext/checks/abi.py

sanitize: setup  ## the CPU kernels under AddressSanitizer and UBSan
	$(PYTHON) fxslim_ext/checks/sanitize.py

clean:  ## what builds left behind (not the environment)
	rm -rf build dist *.egg-info fxslim_ext/*.so
