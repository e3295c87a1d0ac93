# moegraft::torch. Looked up in CMAKE_PREFIX_PATH, then in the project-local virtual environment that tools/setup.sh makes.
# Without MOEGRAFT_CUDA only libtorch_cpu and libc10 are linked, so no CUDA toolkit is needed to configure or build,
# even with the CUDA wheel (find_package(Torch) would insist on one).
file(GLOB venv_torch ${CMAKE_SOURCE_DIR}/.venv/lib/python3*/site-packages/torch)
list(APPEND CMAKE_PREFIX_PATH ${venv_torch})
find_file(MOEGRAFT_TORCH_CONFIG TorchConfig.cmake PATH_SUFFIXES share/cmake/Torch Torch . DOC "TorchConfig.cmake of the LibTorch to use")
if(NOT MOEGRAFT_TORCH_CONFIG)
  message(FATAL_ERROR "LibTorch not found. Run tools/setup.sh, or pass -DCMAKE_PREFIX_PATH=<LibTorch or site-packages/torch>.")
endif()
get_filename_component(MOEGRAFT_TORCH_ROOT ${MOEGRAFT_TORCH_CONFIG}/../../../.. ABSOLUTE)

if(MOEGRAFT_CUDA)
  if(NOT DEFINED ENV{TORCH_CUDA_ARCH_LIST})
    set(TORCH_CUDA_ARCH_LIST "9.0" CACHE STRING "CUDA architectures")  # auto-detection fails on a machine without a GPU
  endif()
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 17)
  find_package(Torch REQUIRED PATHS ${MOEGRAFT_TORCH_ROOT} NO_DEFAULT_PATH)
  add_library(moegraft_torch INTERFACE)
  target_link_libraries(moegraft_torch INTERFACE ${TORCH_LIBRARIES})
  target_compile_definitions(moegraft_torch INTERFACE MOEGRAFT_HAVE_CUDA=1)
else()
  add_library(moegraft_torch INTERFACE)
  target_include_directories(moegraft_torch SYSTEM INTERFACE ${MOEGRAFT_TORCH_ROOT}/include ${MOEGRAFT_TORCH_ROOT}/include/torch/csrc/api/include)
  target_link_libraries(moegraft_torch INTERFACE ${MOEGRAFT_TORCH_ROOT}/lib/libtorch_cpu.so ${MOEGRAFT_TORCH_ROOT}/lib/libc10.so Threads::Threads)
  # The CUDA wheel's libtorch_cpu needs libcudart and libcupti at run time; both come as wheels beside it.
  file(GLOB cuda_runtime_dirs ${MOEGRAFT_TORCH_ROOT}/../nvidia/*/lib)
  target_link_options(moegraft_torch INTERFACE -Wl,--allow-shlib-undefined)
  list(APPEND CMAKE_BUILD_RPATH ${MOEGRAFT_TORCH_ROOT}/lib ${cuda_runtime_dirs})
  list(APPEND CMAKE_INSTALL_RPATH ${MOEGRAFT_TORCH_ROOT}/lib ${cuda_runtime_dirs})
endif()
add_library(moegraft::torch ALIAS moegraft_torch)
