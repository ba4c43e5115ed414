#!/bin/bash
# prepare.sh [PYTHON_VERSION]   fetches, where there is a network, the Python packages that run.sh needs and a machine
# with torch, Triton, nvcc, CMake and ninja may lack; they go to bench/gpu/wheels, which travels with the tree.
set -euo pipefail
cd "$(dirname "$0")"
version=${1:-3.12}
rm -rf wheels && mkdir wheels
platforms=()
for n in 39 35 34 31 28 27 24 17 12 5; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
python3 -m pip download -q --only-binary=:all: --no-deps --python-version "$version" --implementation cp "${platforms[@]}" \
  -d wheels pytest pytest-timeout pytest-xdist pytest-benchmark py-cpuinfo execnet pluggy iniconfig pygments packaging \
  hypothesis sortedcontainers attrs pybind11 matplotlib contourpy cycler fonttools kiwisolver pyparsing \
  python-dateutil six pillow typer rich markdown-it-py mdurl shellingham click typing-extensions jinja2 markupsafe setuptools \
  transformers==5.23.0 tokenizers==0.23.3 huggingface-hub==2.4.0 hf-xet safetensors regex pyyaml tqdm filelock fsspec \
  httpx2==2.16.2 httpcore2==2.16.2 h11 anyio idna truststore
du -sh wheels
