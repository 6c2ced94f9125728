PYTHON ?= python3
BIN = .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test bench lint docs clean

demo: .venv/demo.stamp  ## trains on the embedded corpus: minutes on two CPU cores
	$(BIN)/python -m sedtrain encoder=hubert decoder=bert

test: .venv/dev.stamp  ## the whole test suite, without network
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: .venv/dev.stamp  ## speed and memory beside the peers', in under ten minutes; tables here and JSON in bench/
	mkdir -p bench
	$(BIN)/python benchmarks/training.py --json bench/training.json
	$(BIN)/python benchmarks/decoding.py --speed --rounds 1 --utterances 60 --json bench/decoding.json
	$(BIN)/python benchmarks/data.py --hours 0.05 --rounds 1 --encoders wav2vec2 --json bench/data.json
	$(BIN)/python benchmarks/startup.py --rounds 1 --json bench/startup.json
	$(BIN)/python benchmarks/memory.py --rounds 1 --json bench/memory.json

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/dev.stamp  ## the documentation site, in site/; a link that leads nowhere is an error
	$(BIN)/sphinx-build -q -W --keep-going -b html -c docs . site

clean:
	rm -rf .venv bench dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

.venv/dev.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@
