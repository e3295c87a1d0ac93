# The CUDA side of moegraft::torch. nvcc: CMAKE_CUDA_COMPILER or CUDACXX, else PATH, /usr/local/cuda, or the wheels beside LibTorch (tools/setup.sh --cuda).
if(NOT EXISTS ${torch_lib}/libtorch_cuda.so)
  message(FATAL_ERROR "MOEGRAFT_CUDA=ON, but LibTorch at ${MOEGRAFT_TORCH_ROOT} has no CUDA (no lib/libtorch_cuda.so). Use a CUDA LibTorch or -DMOEGRAFT_CUDA=OFF.")
endif()
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  file(GLOB wheel_toolkits ${MOEGRAFT_TORCH_ROOT}/../nvidia/cu*/bin)
  find_program(MOEGRAFT_NVCC nvcc PATHS /usr/local/cuda/bin ${wheel_toolkits})
  if(NOT MOEGRAFT_NVCC)
    message(FATAL_ERROR "MOEGRAFT_CUDA=ON, but there is no nvcc. Run tools/setup.sh --cuda, set CUDACXX, or pass -DMOEGRAFT_CUDA=OFF.")
  endif()
  set(CMAKE_CUDA_COMPILER ${MOEGRAFT_NVCC})
endif()
# A machine without a GPU cannot detect its architecture. TORCH_CUDA_ARCH_LIST ("9.0;10.0+PTX") is understood as in PyTorch.
if(NOT CMAKE_CUDA_ARCHITECTURES)
  if(DEFINED ENV{TORCH_CUDA_ARCH_LIST})
    string(REGEX REPLACE "[ ,]+" ";" CMAKE_CUDA_ARCHITECTURES "$ENV{TORCH_CUDA_ARCH_LIST}")
    list(TRANSFORM CMAKE_CUDA_ARCHITECTURES REPLACE "\\.|\\+PTX" "")
  else()
    set(CMAKE_CUDA_ARCHITECTURES 90)
  endif()
endif()
set(CMAKE_CUDA_RUNTIME_LIBRARY Shared)  # the one LibTorch uses; a second, static runtime would not share its state
set(CMAKE_CUDA_STANDARD 17)             # CMake 3.25 knows no later one for this compiler; headers that .cu files include stay C++17
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
enable_language(CUDA)
get_filename_component(cuda_bin ${CMAKE_CUDA_COMPILER} REALPATH)
get_filename_component(cuda_root ${cuda_bin}/../.. ABSOLUTE)
if(NOT CUDAToolkit_ROOT)
  set(CUDAToolkit_ROOT ${cuda_root})
endif()
find_package(CUDAToolkit REQUIRED)
message(STATUS "CUDA ${CMAKE_CUDA_COMPILER_VERSION}: ${CMAKE_CUDA_COMPILER}, architectures ${CMAKE_CUDA_ARCHITECTURES}")

target_include_directories(moegraft::torch SYSTEM INTERFACE ${CUDAToolkit_INCLUDE_DIRS})
target_compile_definitions(moegraft::torch INTERFACE MOEGRAFT_HAVE_CUDA=1)
target_compile_options(moegraft::torch INTERFACE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr;--expt-extended-lambda>)
# Nothing refers to libtorch_cuda by symbol: it registers its kernels when loaded, so the linker must keep it.
target_link_libraries(moegraft::torch INTERFACE ${torch_lib}/libc10_cuda.so CUDA::cudart
                      "-Wl,--push-state,--no-as-needed,${torch_lib}/libtorch_cuda.so,--pop-state")
