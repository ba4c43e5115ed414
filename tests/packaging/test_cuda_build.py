"""The CUDA part, built for one SM and loaded on a machine without a driver."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.packaging.envs import ROOT, Venv, call

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(1500)]

# Neither torch nor a driver: the module is loaded by its file.
WITHOUT_TORCH = """
import ctypes, glob, importlib.util, os, sys
sys.modules["torch"] = None
(path,) = glob.glob(os.environ["FOLDER"] + "/vidtok/_cuda*.so")
spec = importlib.util.spec_from_file_location("_cuda", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
info = module.build_info()
assert not info["host"] and info["sms"] == [80] and info["ptx"] == [], info
assert info["compiler"].startswith("nvcc "), info
memory = ctypes.addressof(ctypes.create_string_buffer(4096))
status = module.plan_apply(memory, memory, 0, 4, 4, 16, 16, memory, 0, 0, 0, 0, 256, 1, 0, memory, 80, 4)
print(status, *module.last_error(status))
"""


def has_driver() -> bool:
    try:
        return subprocess.run(["nvidia-smi"], capture_output=True).returncode == 0
    except OSError:
        return False


def test_one_sm(tree: Path, tmp_path: Path) -> None:
    nvcc = subprocess.run([ROOT / "scripts/nvcc", sys.executable], stdout=subprocess.PIPE, text=True, check=True)
    cuda = {"VIDTOK_NO_CUDA": "", "VIDTOK_CUDA_ARCHS": "80", "CUDACXX": nvcc.stdout.strip()}
    call(sys.executable, "-m", "pip", "-q", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, tree, **cuda)
    (wheel,) = tmp_path.glob("vidtok-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "wheel")
    assert len(list((tmp_path / "wheel/vidtok").glob("_C.*"))) == 1
    said = call(sys.executable, "-c", WITHOUT_TORCH, FOLDER=str(tmp_path / "wheel"))
    if not has_driver():
        assert "launch of " in said and "on sm_80 with 1 blocks of 256 threads" in said and "driver" in said
    # The kernels' libraries are inside: nothing but the system's own is loaded.
    (module,) = (tmp_path / "wheel/vidtok").glob("_cuda.*")
    needed = [line.split("[")[1].rstrip("]") for line in call("readelf", "-d", module).splitlines() if "NEEDED" in line]
    assert not [name for name in needed if "cuda" in name or "torch" in name or "gomp" in name], needed


def test_what_cannot_be_built_says_so_in_one_sentence(tree: Path, tmp_path: Path) -> None:
    install = ("install", "--no-deps", "--no-build-isolation", tree)
    venv = Venv(tmp_path / "venv")
    said = venv.pip(*install, ok=False, VIDTOK_NO_CUDA="", VIDTOK_CUDA_ARCHS="75")
    assert "vidtok: expected VIDTOK_CUDA_ARCHS of none or of 70, 80, 86, 89 or 90" in said and "got '75'" in said
    said = venv.pip(*install, ok=False, VIDTOK_NO_CUDA="", VIDTOK_CUDA_ARCHS="80", CUDACXX="/nonexistent/nvcc")
    assert "vidtok: expected nvcc for VIDTOK_CUDA_ARCHS=80" in said
