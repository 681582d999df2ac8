# make demo      train, evaluate and draw the embedded default: no GPU, no network after installation
# make test      run the tests
# make style     format the code;   make quality: check it
# make backbone  train the demo's tiny backbone anew (it ships in assets/)

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

# The demo's models are so small that a second thread costs more than it brings.
demo backbone test: export OMP_NUM_THREADS ?= 1
# Nothing here needs the Hub.
demo backbone test: export HF_HUB_OFFLINE ?= 1

# An interrupted training goes on from its last checkpoint.
resume = $(if $(wildcard $(1)/checkpoint-*),--resume_from_checkpoint last)

.PHONY: demo test style quality backbone

demo: $(INSTALLED) data/digits/test.parquet
	@mkdir -p runs
	$(MAKE) -j2 runs/digits_lora/adapter_model.safetensors runs/digits_pvm/model.safetensors
	$(RUN) eval.py --config recipes/digits_eval.yaml --overwrite true

test: $(INSTALLED)
	$(RUN) -m pytest

style: $(INSTALLED)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

quality: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

backbone: $(INSTALLED) data/digits-backbone/test.parquet
	$(RUN) -m pvm.digits.backbone --output_dir runs/digits_untrained
	$(RUN) train.py --config recipes/digits_backbone.yaml $(call resume,runs/digits_backbone)

$(INSTALLED): requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

data/digits/test.parquet:
	$(RUN) -m pvm.digits.data --output_dir data/digits

data/digits-backbone/test.parquet:
	$(RUN) -m pvm.digits.data --output_dir data/digits-backbone --stage backbone

runs/digits_pvm/model.safetensors:
	$(RUN) train.py --config recipes/digits_pvm.yaml $(call resume,runs/digits_pvm)

# Beside the training above, so its progress goes to a file.
runs/digits_lora/adapter_model.safetensors:
	@echo "The LoRA control trains in parallel; its progress is in runs/digits_lora.log"
	@$(RUN) train.py --config recipes/digits_lora.yaml $(call resume,runs/digits_lora) > runs/digits_lora.log 2>&1 \
		|| (tail -5 runs/digits_lora.log; exit 1)
