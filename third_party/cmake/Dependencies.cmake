# How every dependency is found. Nothing is vendored: Debian packages, and LibTorch from the pinned PyPI wheel (or any LibTorch on CMAKE_PREFIX_PATH).
# Read by our own build and, installed beside moegraftConfig.cmake, by a user's find_package(moegraft). What the libraries' interfaces name is an
# imported target, so the exported targets refer to it by the same name in both places.
if(CMAKE_FIND_PACKAGE_NAME STREQUAL "moegraft")
  include(CMakeFindDependencyMacro)
  macro(moegraft_find)
    find_dependency(${ARGV})
  endmacro()
else()
  macro(moegraft_find)
    find_package(${ARGV} REQUIRED)
  endmacro()
endif()

moegraft_find(Threads)
moegraft_find(PkgConfig)
moegraft_find(yaml-cpp)
moegraft_find(nlohmann_json)
moegraft_find(PNG)
moegraft_find(JPEG)
moegraft_find(TIFF)
moegraft_find(LibArchive)
pkg_check_modules(GD REQUIRED IMPORTED_TARGET gdlib)
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(UTF8PROC REQUIRED IMPORTED_TARGET libutf8proc)
if(NOT CMAKE_FIND_PACKAGE_NAME STREQUAL "moegraft")  # of recipes/, which are not installed
  moegraft_find(Freetype)
  moegraft_find(pugixml)
  pkg_check_modules(HARFBUZZ REQUIRED IMPORTED_TARGET harfbuzz)
endif()

# spdlog stays behind base/log.h: its fmt and the fmt inside Torch's include folder must never meet in one translation unit.
moegraft_find(spdlog)
if(NOT TARGET moegraft::spdlog)
  add_library(moegraft::spdlog INTERFACE IMPORTED)
  target_link_libraries(moegraft::spdlog INTERFACE $<LINK_ONLY:spdlog::spdlog>)
endif()

pkg_check_modules(SENTENCEPIECE REQUIRED IMPORTED_TARGET sentencepiece)
find_library(SENTENCEPIECE_TRAIN_LIBRARY sentencepiece_train REQUIRED)
if(NOT TARGET moegraft::sentencepiece)
  add_library(moegraft::sentencepiece INTERFACE IMPORTED)
  target_link_libraries(moegraft::sentencepiece INTERFACE ${SENTENCEPIECE_TRAIN_LIBRARY} PkgConfig::SENTENCEPIECE)
endif()

include(${CMAKE_CURRENT_LIST_DIR}/LibTorch.cmake)
include(${CMAKE_CURRENT_LIST_DIR}/Arrow.cmake)
