# make build PYTHON=/path/to/python   builds python/vidtok/_C.<soabi>.so in place
SHELL := /bin/bash
PYTHON ?= python3

.PHONY: build
build:
	$(PYTHON) setup.py -q build_ext --inplace
