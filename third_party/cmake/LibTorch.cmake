# moegraft::torch: LibTorch from MOEGRAFT_TORCH_CONFIG, else CMAKE_PREFIX_PATH, else the environment that tools/setup.sh makes (for an installed
# package: the LibTorch it was built with). We link its libraries directly: find_package(Torch) of the CUDA wheel stops where no CUDA toolkit is,
# and with one it asks for libraries that nothing here uses.
if(CMAKE_FIND_PACKAGE_NAME STREQUAL "moegraft")
  set(torch_hints ${MOEGRAFT_BUILT_WITH_TORCH})
else()
  file(GLOB torch_hints ${CMAKE_SOURCE_DIR}/.venv/lib/python3*/site-packages/torch)
endif()
find_file(MOEGRAFT_TORCH_CONFIG TorchConfig.cmake HINTS ${torch_hints} PATH_SUFFIXES share/cmake/Torch torch/share/cmake/Torch cmake/Torch Torch
          DOC "TorchConfig.cmake of the LibTorch to use")
if(NOT MOEGRAFT_TORCH_CONFIG)
  message(FATAL_ERROR "LibTorch not found. Run tools/setup.sh, or pass -DCMAKE_PREFIX_PATH=<LibTorch or site-packages/torch>.")
endif()
get_filename_component(MOEGRAFT_TORCH_ROOT ${MOEGRAFT_TORCH_CONFIG}/../../../.. ABSOLUTE)
set(torch_lib ${MOEGRAFT_TORCH_ROOT}/lib)
if(NOT EXISTS ${torch_lib}/libtorch_cpu.so)
  message(FATAL_ERROR "LibTorch at ${MOEGRAFT_TORCH_ROOT} has no lib/libtorch_cpu.so; pass another with -DMOEGRAFT_TORCH_CONFIG=<…/TorchConfig.cmake>.")
endif()
get_filename_component(torch_config_dir ${MOEGRAFT_TORCH_CONFIG} DIRECTORY)
file(STRINGS ${torch_config_dir}/TorchConfigVersion.cmake torch_version REGEX "set\\(PACKAGE_VERSION ")
string(REGEX REPLACE ".*\"([0-9.]+).*" "\\1" MOEGRAFT_TORCH_VERSION "${torch_version}")
message(STATUS "LibTorch ${MOEGRAFT_TORCH_VERSION}: ${MOEGRAFT_TORCH_ROOT}")
if(MOEGRAFT_BUILT_WITH_TORCH_VERSION AND NOT MOEGRAFT_TORCH_VERSION STREQUAL MOEGRAFT_BUILT_WITH_TORCH_VERSION)
  message(FATAL_ERROR "moegraft was built with LibTorch ${MOEGRAFT_BUILT_WITH_TORCH_VERSION}, found ${MOEGRAFT_TORCH_VERSION} at ${MOEGRAFT_TORCH_ROOT}. "
                      "Pass the same release with -DMOEGRAFT_TORCH_CONFIG=<…/TorchConfig.cmake>.")
endif()

# The CUDA wheel's libraries need libcudart and others at run time; they come as wheels beside it.
file(GLOB torch_runtime_dirs ${MOEGRAFT_TORCH_ROOT}/../nvidia/*/lib)
list(APPEND CMAKE_BUILD_RPATH ${torch_lib} ${torch_runtime_dirs})
list(APPEND CMAKE_INSTALL_RPATH ${torch_lib} ${torch_runtime_dirs})

if(NOT TARGET moegraft::torch)
  add_library(moegraft::torch INTERFACE IMPORTED)
  target_include_directories(moegraft::torch SYSTEM INTERFACE ${MOEGRAFT_TORCH_ROOT}/include ${MOEGRAFT_TORCH_ROOT}/include/torch/csrc/api/include)
  target_link_libraries(moegraft::torch INTERFACE ${torch_lib}/libtorch_cpu.so ${torch_lib}/libc10.so Threads::Threads)
  target_link_options(moegraft::torch INTERFACE -Wl,--allow-shlib-undefined)
  if(MOEGRAFT_CUDA)
    include(${CMAKE_CURRENT_LIST_DIR}/Cuda.cmake)
  endif()
endif()
