"""What kernel files may hold, so that one source runs on five SMs, under NVRTC and on the host.

Everything of CUDA itself lies in csrc/cuda/tile, each piece with its host twin; kernel files hold only its words.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vidtok.kernels.select import OPERATORS

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "csrc/cuda"
GUARD = "!defined(__CUDACC_RTC__)"
# Operators that share a file.
FILE = {"bipartite_match": "bipartite", "bipartite_merge": "bipartite"}
LAYERS = (
    "csrc/cuda/{}.cu",
    "csrc/cuda/{}.h",
    "csrc/include/vidtok/{}.h",
    "python/vidtok/kernels/reference/{}.py",
    "python/vidtok/kernels/native/{}.py",
    "python/vidtok/kernels/cuda/{}.py",
    "python/vidtok/kernels/triton/{}.py",
    "python/vidtok/kernels/tables/{}.py",
)

# What kernel files may not say, and what to say instead.
FORBIDDEN = {
    r"__shared__": "VIDTOK_SMEM",
    r"__(constant|managed)__": "arguments",
    r"__device__(?!\s*__forceinline__)": "VIDTOK_DEVICE",
    r"\bcooperative_groups\b|\bcg::": "block_sync and warp_sync",
    r"\b(cub|thrust|wmma|nvcuda)::": "tile/",
    r"\basm\b": "tile/, with a host twin",
    r"\b__syncthreads\w*|\b__syncwarp\b|\b__threadfence\w*": "block_sync, warp_sync and tile/atomic.h",
    r"\b__(shfl|ballot|any|all|match|reduce|activemask)\w*": "shuffle and ballot",
    r"\b__(popc|clz|ffs|fmaf|fdividef|ldg|float2half|half2float|float_as|int_as|uint_as)\w*": "tile/",
    r"\batomic[A-Z]\w*": "tile/atomic.h",
    r"\b(threadIdx|blockIdx|blockDim|gridDim|warpSize)\b": "thread(), block(), threads(), blocks()",
    r"<<<": "VIDTOK_LAUNCH",
    r"\bVIDTOK_HOST\b": "a twin in tile/",
    r"\b__CUDA_ARCH__\b": "VIDTOK_SM",
    r"#\s*pragma\s+unroll": "VIDTOK_UNROLL",
    r"\bcuda(Malloc|Free|Memcpy|Memset|DeviceSynchronize|StreamSynchronize|LaunchKernel)\w*": "tile/launch.h",
}  # fmt: skip


def code(text: str) -> str:
    """The text without comments and without what strings say; lines stay where they are."""
    pattern = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.S)

    def blank(match: re.Match[str]) -> str:
        found = match[0]
        line = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
        if found[0] == '"':
            return found if re.match(r"\s*#\s*include\s*$", line) else '""'
        return "\n" * found.count("\n")

    return pattern.sub(blank, text)


def words(text: str) -> list[str]:
    """Words that only tile/ and host/ may use."""
    out = []
    for number, line in enumerate(code(text).splitlines(), 1):
        for pattern, instead in FORBIDDEN.items():
            if match := re.search(pattern, line):
                out.append(f"line {number}: expected {instead}, got {match[0].strip()}")
    return out


def chains(text: str) -> list[str]:
    """Every choice by SM must end in #else: a new SM then meets code or an error, never nothing."""
    out = []
    stack: list[tuple[int, bool, bool]] = []  # (line, asks for the SM, has #else)
    for number, line in enumerate(re.sub(r"\\\n", " ", code(text)).splitlines(), 1):
        match = re.match(r"\s*#\s*(if|ifdef|ifndef|elif|else|endif)\b(.*)", line)
        if not match:
            continue
        asks = bool(re.search(r"\b(VIDTOK_SM|__CUDA_ARCH__)\b", match[2]))
        if match[1].startswith("if"):
            stack.append((number, asks, False))
        elif match[1] == "endif":
            begin, asked, closed = stack.pop()
            if asked and not closed:
                out.append(f"line {begin}: expected #else in a choice by VIDTOK_SM, got none")
        else:
            begin, asked, closed = stack.pop()
            stack.append((begin, asked or asks, closed or match[1] == "else"))
    return out + [f"line {begin}: expected #endif, got none" for begin, _, _ in stack]


def launchers(text: str) -> list[str]:
    """Launchers, and headers NVRTC does not have, stay where NVRTC does not look; kernels stay where it does."""
    out = []
    stack: list[bool] = []  # whether a region is hidden from NVRTC
    anonymous = 0
    for number, line in enumerate(code(text).splitlines(), 1):
        if match := re.match(r"\s*#\s*(if|ifdef|ifndef|elif|else|endif)\b(.*)", line):
            if match[1].startswith("if"):
                stack.append(match[1] == "if" and match[2].strip() == GUARD)
            elif match[1] == "endif":
                stack.pop()
            else:
                stack[-1] = False
            continue
        hidden = any(stack)
        match = re.search(r"#\s*include\s*<[^>]*>|\bVIDTOK_LAUNCH\b|\bStatus\b|\bstd::|cuda/tile/launch\.h", line)
        if match and not hidden:
            out.append(f"line {number}: expected it below #if {GUARD}, got {match[0]} above")
        if hidden and re.search(r"\b__global__\b", line):
            out.append(f"line {number}: expected kernels above #if {GUARD}, got one below")
        if re.search(r"\bnamespace\s*{", line):
            anonymous = number
        elif re.search(r"}\s*$", line) and line.startswith("}"):
            anonymous = 0
        if anonymous and re.search(r"\b__global__\b", line):
            out.append(f"line {number}: expected kernels with names that NVRTC can ask for, got an anonymous namespace")
    return out


def kernel_files() -> list[Path]:
    return sorted(p for p in CUDA.iterdir() if p.suffix in (".cu", ".h"))


def test_the_files_are_found() -> None:
    assert {"plan_apply.cu", "plan_apply.h", "launch.cu"} <= {p.name for p in kernel_files()}


@pytest.mark.parametrize("path", kernel_files(), ids=lambda p: p.name)
def test_kernels_speak_the_vocabulary(path: Path) -> None:
    assert words(path.read_text()) == []


@pytest.mark.parametrize("path", sorted(CUDA.rglob("*.h")) + sorted(CUDA.glob("*.cu")), ids=lambda p: p.name)
def test_choices_by_sm_end_in_else(path: Path) -> None:
    assert chains(path.read_text()) == []


@pytest.mark.parametrize("path", [p for p in kernel_files() if p.suffix == ".cu"], ids=lambda p: p.name)
def test_launchers_are_hidden_from_nvrtc(path: Path) -> None:
    text = path.read_text()
    # launch.cu holds no kernels and is never given to NVRTC.
    if "__global__" in text or "VIDTOK_LAUNCH" in text:
        assert launchers(text) == []


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_is_in_every_layer(operator: str) -> None:
    name = FILE.get(operator, operator)
    assert [layer for layer in (text.format(name) for text in LAYERS) if not (ROOT / layer).is_file()] == []
    assert f'"{operator}' in (ROOT / "csrc/bindings/cuda.cpp").read_text()
    for backend in ("cuda", "triton"):
        assert f"def {operator}(" in (ROOT / f"python/vidtok/kernels/{backend}/{name}.py").read_text()


def test_no_file_without_an_operator() -> None:
    named = {FILE.get(operator, operator) for operator in OPERATORS}
    assert {p.stem for p in CUDA.glob("*.cu")} - {"launch"} == named


# ---------------------------------------------------------------------- the checks themselves
@pytest.mark.parametrize(
    "line",
    [
        "__shared__ float tile[32];",
        "extern __shared__ int x[];",
        "__constant__ int table[4];",
        "__device__ int counter;",
        "namespace cg = cooperative_groups;",
        "cub::BlockScan<int, 256> scan;",
        'asm volatile("bar.sync 0;");',
        "const int i = __shfl_xor_sync(mask, x, 1);",
        "__syncthreads();",
        "__syncthreads_or(1);",
        "if (__any_sync(~0u, x)) return;",
        "const int t = threadIdx.x;",
        "int64_t b = blockIdx.x * blockDim.x;",
        "kernel<<<1, 32>>>(x);",
        "atomicAdd(sum, x);",
        "#if defined(VIDTOK_HOST)",
        "#if __CUDA_ARCH__ >= 800",
        "#pragma unroll 4",
        "cudaMemcpyAsync(a, b, n, cudaMemcpyDefault, stream);",
        "const float f = __fmaf_rn(a, b, c);",
    ],
)
def test_forbidden_words_are_found(line: str) -> None:
    assert len(words(f"int x;\n{line}\n")) >= 1
    assert words(line)[0].startswith("line 1: expected ")


@pytest.mark.parametrize(
    "line",
    [
        "// __shared__ memory comes from VIDTOK_SMEM, threadIdx from thread()",
        "/* asm\n   __syncthreads */ int x;",
        'fail(Status::value, "expected no asm, got __shared__");',
        "VIDTOK_SMEM(shared);",
        "VIDTOK_UNROLL",
        "int asmuch = thread() + blocks();",
        "atomic_add(count, 1);",
        '#include "cuda/tile/block.h"',
    ],
)
def test_allowed_words_pass(line: str) -> None:
    assert words(line) == []


def test_a_choice_without_else_is_found() -> None:
    good = "#if VIDTOK_SM >= 80\nint a;\n#else\nint b;\n#endif\n"
    bad = good.replace("#else\nint b;\n", "")
    assert chains(good) == []
    assert chains(bad) == ["line 1: expected #else in a choice by VIDTOK_SM, got none"]
    assert chains("#if defined(VIDTOK_HOST)\n#elif VIDTOK_SM >= 80\n#endif\n") != []
    assert chains(f"#if defined(OTHER)\n{good}#endif\n") == []
    assert chains(f"#if defined(OTHER)\n{bad}#else\n#endif\n") != []
    assert chains("// #if VIDTOK_SM >= 80\n#if defined(OTHER)\n#endif\n") == []
    assert chains("#if defined(VIDTOK_HOST) && \\\n  VIDTOK_SM >= 80\n#endif\n") != []
    assert chains("#if VIDTOK_SM >= 80\n#else\n") != []


def test_a_launcher_in_the_open_is_found() -> None:
    kernel = "namespace v {\n__global__ void k(int* x) { *x = 1; }\n}  // namespace v\n"
    launcher = "Status k_all(const Launch& on) { return VIDTOK_LAUNCH(k, 1, 32, 0, on, nullptr); }\n"
    assert launchers(f"{kernel}#if {GUARD}\n#include <vector>\n{launcher}#endif\n") == []
    assert len(launchers(kernel + launcher)) == 1
    assert launchers(f"#include <cstdint>\n{kernel}") != []
    assert launchers(f"#if {GUARD}\n{kernel}#endif\n") != []
    assert launchers(f"#if defined(OTHER)\n{kernel}{launcher}#endif\n") != []
    assert launchers(kernel.replace("namespace v", "namespace")) != []
    assert launchers(f"#if {GUARD}\n#if defined(OTHER)\n{launcher}#endif\n{launcher}#endif\n") == []
    assert launchers(f"#if {GUARD}\n#endif\n{launcher}") != []
