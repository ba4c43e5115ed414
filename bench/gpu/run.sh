#!/bin/bash
# run.sh   builds, tests, sanitises and measures on the GPU of this machine, in under eight minutes and without a
# network (bench/gpu/prepare.sh fetches what may be missing). Results go to bench/results/<gpu>; each stage writes its
# own, so that a run cut short still counts. Where $OUT is set, its few files hold the same after every stage: the
# tables, and everything in results.tar.gz. Stages to leave out: SKIP="ptx sanitizer". No stage goes on after
# LIMIT seconds (465) or begins shortly before.
# DRY=1 goes through the script on a machine without a GPU, with stand-ins and tiny shapes; its numbers say nothing.
set -uo pipefail
cd "$(dirname "$0")/../.."
limit=${LIMIT:-465}
python=${PYTHON:-python3}
site=$PWD/build/gpu-site
if compgen -G "bench/gpu/wheels/*.whl" >/dev/null && [ ! -d "$site" ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" bench/gpu/wheels/*.whl
fi
export PYTHONPATH=$PWD/python:$PWD:$site PYTHONUNBUFFERED=1 PATH=$site/bin:$PATH:/usr/local/cuda/bin
dry=()
if [ -n "${DRY:-}" ]; then
  export VIDTOK_GPU_TESTS=cpu TRITON_INTERPRET=1
  name=dry sm=90 dry=(--tiny --no-compile)
else
  name=$("$python" -c 'from bench.gpu.__main__ import gpu_name; import torch; print(gpu_name(torch.device("cuda", 0)))') || exit 2
  sm=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability(0))') || exit 2
fi
out=bench/results/$name
logs=build/gpu-logs
mkdir -p "$out" "$logs"
echo "stage,seconds,status,last line" >"$out/stages.csv"

# Puts what there is into $OUT, if that is set.
hand_over() {
  [ -n "${OUT:-}" ] || return 0
  mkdir -p "$OUT"
  cp "$out"/*.csv "$out"/environment.json "$OUT" 2>/dev/null
  tar -czf "$logs/../gpu-logs.$BASHPID" -C "$logs" . && mv "$logs/../gpu-logs.$BASHPID" "$OUT/logs.tar.gz"
  tar -czf "$logs/../gpu-results.$BASHPID" -C "$out" . && mv "$logs/../gpu-results.$BASHPID" "$OUT/results.tar.gz"
}

# stage NAME SECONDS COMMAND...   runs one stage within its time; its end is recorded whatever happens.
stage() {
  local name=$1 most=$(($2 < limit - SECONDS ? $2 : limit - SECONDS)) start=$SECONDS status last
  shift 2
  [[ " ${SKIP:-} " == *" ${name%% *} "* ]] && return 0
  if [ "$most" -lt 10 ]; then
    echo "$name,0,,left out: $limit seconds are over" >>"$out/stages.csv"
    printf '%-28s left out: %s s are over\n' "$name" "$limit"
    return 0
  fi
  timeout -k 10 "$most" "$@" >"$logs/${name// /-}.log" 2>&1
  status=$?
  last=$(grep -v '^[[:space:]]*$' "$logs/${name// /-}.log" | tail -1 | tr -d '"' | cut -c1-160)
  echo "$name,$((SECONDS - start)),$status,\"$last\"" >>"$out/stages.csv"
  printf '%-28s %4d s  %s  %s\n' "$name" $((SECONDS - start)) "$([ $status = 0 ] && echo ok || echo "FAILED ($status)")" "$last"
  hand_over
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
workers=$(($(nproc) < 8 ? $(nproc) : 8))
test=("$python" -m pytest -q -p no:cacheprovider -m gpu)
stage "tests" 150 "${test[@]}" -n "$workers" tests/gpu
stage "bench cuda" 170 "$python" -m bench.gpu --backend cuda --seconds 140 ${dry[@]+"${dry[@]}"} --out "$out/cuda.csv"
stage "plots" 30 "$python" -m bench.gpu.report "$out"
stage "bench triton" 60 "$python" -m bench.gpu --backend triton --no-compile --seconds 45 ${dry[@]+"${dry[@]}"} --out "$out/triton.csv"
# Whole models need transformers, which the other stages do without.
where=$([ -n "${DRY:-}" ] && echo cpu || echo cuda)
if "$python" -c "import transformers" 2>/dev/null; then
  stage "decoder" 100 "$python" -m bench.decoder --device "$where" ${dry[@]+--tiny} --out "$out/decoder.csv"
fi
for ptx in ${others[@]+"${others[@]}"}; do
  stage "ptx $ptx" 100 env VIDTOK_CUDA_SM="$ptx" VIDTOK_CUDA_MODULE="$(compgen -G "build/cuda-image-$ptx-virtual/module/_cuda*")" \
    "${test[@]}" -n $((workers / 2 + 1)) -k "cuda and test_equals_reference" tests/gpu/test_operators.py &
done
wait
[ -n "${DRY:-}" ] || stage "tune" 90 "$python" -m vidtok tune --minutes 1 --out "$out/tuning.json"
if "$python" -c "import transformers" 2>/dev/null; then
  stage "vision" 90 "$python" -m bench.vision --device "$where" ${dry[@]+--tiny} --out "$out/vision.csv"
fi
for tool in memcheck racecheck; do
  command -v compute-sanitizer >/dev/null && [ -z "${DRY:-}" ] || break
  stage "sanitizer $tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
    "$python" -m bench.gpu.sanitize
done
"$python" -m bench.gpu.report "$out" >/dev/null 2>&1
tar -czf "$out/logs.tar.gz" -C "$logs" .
hand_over
grep -hE "limit|wrote|median" "$logs"/bench-*.log 2>/dev/null | tail -60
echo "took $SECONDS s; results in $out${OUT:+ and $OUT}"
! cut -d, -f3 "$out/stages.csv" | tail -n +2 | grep -qvx '0\?'
