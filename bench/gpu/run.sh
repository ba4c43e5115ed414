#!/bin/bash
# run.sh   builds, tests, sanitises and measures on the GPU of this machine, in under eight minutes and without a
# network (bench/gpu/prepare.sh fetches what may be missing). Results go to $OUT, or else to bench/results/<gpu>;
# each stage writes its own, so that a run cut short still counts. Stages to leave out: SKIP="ptx sanitizer".
# DRY=1 goes through the script on a machine without a GPU, with stand-ins and tiny shapes; its numbers say nothing.
set -uo pipefail
cd "$(dirname "$0")/../.."
begin=$SECONDS
python=${PYTHON:-python3}
site=$PWD/build/gpu-site
if compgen -G "bench/gpu/wheels/*.whl" >/dev/null && [ ! -d "$site" ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" bench/gpu/wheels/*.whl
fi
export PYTHONPATH=$PWD/python:$PWD:$site PYTHONUNBUFFERED=1 PATH=$site/bin:$PATH
dry=()
if [ -n "${DRY:-}" ]; then
  export VIDTOK_GPU_TESTS=cpu TRITON_INTERPRET=1
  name=dry sm=90 dry=(--tiny --no-compile)
else
  name=$("$python" -c 'from bench.gpu.__main__ import gpu_name; import torch; print(gpu_name(torch.device("cuda", 0)))') || exit 2
  sm=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability(0))') || exit 2
fi
out=${OUT:-bench/results/$name}
logs=build/gpu-logs
mkdir -p "$out" "$logs"
echo "stage,seconds,status,last line" >"$out/stages.csv"
failed=0

# stage NAME SECONDS COMMAND...   runs one stage within its time; its end is recorded whatever happens.
stage() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  [[ " ${SKIP:-} " == *" ${name%% *} "* ]] && return 0
  timeout -k 10 "$limit" "$@" >"$logs/${name// /-}.log" 2>&1
  status=$?
  ((status)) && failed=1
  local last
  last=$(grep -v '^[[:space:]]*$' "$logs/${name// /-}.log" | tail -1 | tr -d '"' | cut -c1-160)
  echo "$name,$((SECONDS - start)),$status,\"$last\"" >>"$out/stages.csv"
  printf '%-28s %4d s  %s  %s\n' "$name" $((SECONDS - start)) "$([ $status = 0 ] && echo ok || echo "FAILED ($status)")" "$last"
}

"$python" - >"$out/environment.json" <<'PY'
import json, platform, subprocess
import torch, triton
from vidtok import __version__
from bench.row import commit, cpu_name
gpu = {}
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    gpu = {"gpu": p.name, "sm": f"{p.major}{p.minor}", "sms": p.multi_processor_count, "memory": p.total_memory,
           "l2": p.L2_cache_size}
nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout.strip().splitlines()[-2:]
ask = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
driver = subprocess.run(ask, capture_output=True, text=True).stdout.strip() if gpu else None
print(json.dumps({**gpu, "driver, clock, power": driver, "cpu": cpu_name(), "python": platform.python_version(),
    "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__, "nvcc": nvcc,
    "vidtok": __version__, "commit": commit()}, indent=1))
PY

# One module for the SM of this GPU, and one each of PTX alone, so that the code paths of other cards run here too.
image() {
  local build=build/cuda-image-$1
  cmake -S . -B "$build" -G Ninja -DVIDTOK_CUDA_IMAGES="$1" -DVIDTOK_BUILD_MODULE=OFF \
    -DPython_EXECUTABLE="$(command -v "$python")" \
    -DVIDTOK_PYBIND11_INCLUDE="$("$python" -c 'import pybind11; print(pybind11.get_include())')" &&
    cmake --build "$build"
}
export -f image
export python
others=()
for ptx in 80 86 89; do [ "$ptx" -lt "$sm" ] && others+=("$ptx"); done
stage "build" 240 bash -c 'VIDTOK_CUDA_ARCHS='"$sm"' "$python" setup.py -q build_ext --inplace & main=$!
for ptx in '"${others[*]}"'; do image "$ptx-virtual" & done; wait $main; status=$?; wait; exit $status'
workers=$(($(nproc) < 4 ? $(nproc) : 4))
test=("$python" -m pytest -q -p no:cacheprovider -n "$workers" -m gpu)
stage "tests" 150 "${test[@]}" tests/gpu
for ptx in ${others[@]+"${others[@]}"}; do
  stage "ptx $ptx" 60 env VIDTOK_CUDA_SM="$ptx" VIDTOK_CUDA_MODULE="$(compgen -G "build/cuda-image-$ptx-virtual/module/_cuda*")" \
    "${test[@]}" -k "cuda and test_equals_reference" tests/gpu/test_operators.py
done
for tool in memcheck racecheck; do
  command -v compute-sanitizer >/dev/null && [ -z "${DRY:-}" ] || break
  stage "sanitizer $tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
    "$python" -m bench.gpu.sanitize
done
stage "bench cuda" 110 "$python" -m bench.gpu --backend cuda --seconds 90 ${dry[@]+"${dry[@]}"} --out "$out/cuda.csv"
stage "bench triton" 70 "$python" -m bench.gpu --backend triton --no-compile --seconds 50 ${dry[@]+"${dry[@]}"} --out "$out/triton.csv"
[ -n "${DRY:-}" ] || stage "tune" 120 "$python" -m vidtok tune --minutes 1 --out "$out/tuning.json"
stage "plots" 30 "$python" -m bench.gpu.report "$out"
tar -czf "$out/logs.tar.gz" -C "$logs" .
grep -hE "limit|wrote|median" "$logs"/bench-*.log 2>/dev/null | tail -60
echo "took $((SECONDS - begin)) s; results in $out"
exit $failed
