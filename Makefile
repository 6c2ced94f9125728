PYTHON ?= python3
BIN = .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test lint docs clean

demo: .venv/demo.stamp  ## trains on the embedded corpus: minutes on two CPU cores
	$(BIN)/python -m sedtrain encoder=hubert decoder=bert

test: .venv/dev.stamp  ## the whole test suite, without network
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/dev.stamp  ## the documentation site, in site/; a link that leads nowhere is an error
	$(BIN)/sphinx-build -q -W --keep-going -b html -c docs . site

clean:
	rm -rf .venv dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

.venv/dev.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@
