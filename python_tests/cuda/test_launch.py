"""launch() as nvcc compiles it, over a CUDA runtime of our own: what it asks for, and which errors it leaves."""

import importlib.util
import pathlib
import subprocess

import pytest

CSRC = pathlib.Path(__file__).parents[2] / "csrc"
spec = importlib.util.spec_from_file_location("find_toolkit", CSRC / "find_toolkit.py")
find_toolkit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(find_toolkit)

pytestmark = pytest.mark.slow  # calls nvcc

PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include "cuda/kernels/launch.cuh"

extern "C" const char* failing;

__global__ void kernel(int* p) { *p = 1; }

int main(int, char** argv) {
  failing = argv[1];
  const prunekernels::LaunchShape shape{dim3(2), dim3(32), static_cast<size_t>(std::atoi(argv[2]))};
  const cudaError_t status = prunekernels::launch(kernel, shape, nullptr, static_cast<int*>(nullptr));
  std::printf("returns %d leaves %d\n", status, cudaPeekAtLastError());
}
"""
RUNTIME = r"""
#include <cuda_runtime_api.h>
#include <cstdio>
#include <cstring>

static cudaError_t last = cudaSuccess;
static size_t pushed = 0;

extern "C" {
const char* failing = "";

static cudaError_t result(const char* name) {
  if (std::strcmp(name, failing) != 0) return cudaSuccess;
  return last = cudaErrorInvalidValue;
}

cudaError_t cudaGetDevice(int* device) { *device = 3; return result("device"); }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = 1000 * device + 232448;
  return result("limit");
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  std::printf("allows %d\n", value);
  return result("attribute");
}
cudaError_t cudaGetLastError() { const cudaError_t error = last; last = cudaSuccess; return error; }
cudaError_t cudaPeekAtLastError() { return last; }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t shared, cudaStream_t) {
  std::printf("launches with %zu\n", shared);
  return result("launch");
}

// What nvcc makes of <<<>>> and of the file.
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t shared, CUstream_st*) { pushed = shared; return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t* shared, void*) { *shared = pushed; return cudaSuccess; }
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
char __cudaInitModule(void**) { return 0; }
cudaError_t __cudaGetKernel(void** kernel, const void*) { *kernel = nullptr; return cudaSuccess; }
cudaError_t __cudaLaunchKernel(void*, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(nullptr, grid, block, args, shared, stream);
}
cudaError_t __cudaLaunchKernel_ptsz(void*, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(nullptr, grid, block, args, shared, stream);
}
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    toolkit = find_toolkit.find_toolkit()
    if not toolkit:
        pytest.skip("nvcc cannot be found")
    folder = tmp_path_factory.mktemp("launch")
    sources = [folder / "launch.cu", folder / "runtime.cpp"]
    for source, text in zip(sources, (PROGRAM, RUNTIME), strict=True):
        source.write_text(text)
    nvcc = [toolkit / "bin" / "nvcc", "-std=c++17", "-O0", f"-I{CSRC}", "-cudart", "none", "-arch=sm_80"]
    done = subprocess.run([*nvcc, *sources, "-o", folder / "launch"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return lambda *words: subprocess.run([folder / "launch", *words], capture_output=True, text=True).stdout.split("\n")


def test_little_shared_memory_needs_no_asking(program):
    assert program("", "49152") == ["launches with 49152", "returns 0 leaves 0", ""]


@pytest.mark.parametrize("bytes_", ["49153", "70000"])
def test_more_asks_for_all_there_is(program, bytes_):
    """Two threads may launch the same kernel with other sizes, so each sets the one value that serves all."""
    assert program("", bytes_) == ["allows 235448", f"launches with {bytes_}", "returns 0 leaves 0", ""]


@pytest.mark.parametrize("failing", ["device", "limit", "attribute", "launch"])
def test_no_error_is_left_for_the_next_caller(program, failing):
    assert program(failing, "70000")[-2] == "returns 1 leaves 0"
