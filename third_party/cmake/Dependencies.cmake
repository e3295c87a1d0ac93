# How every dependency is found. Nothing is vendored: Debian packages, and LibTorch from the pinned PyPI wheel (or any LibTorch on CMAKE_PREFIX_PATH).
find_package(Threads REQUIRED)
find_package(OpenMP REQUIRED)
find_package(PkgConfig REQUIRED)
find_package(yaml-cpp REQUIRED)
find_package(nlohmann_json REQUIRED)
find_package(PNG REQUIRED)
find_package(JPEG REQUIRED)
find_package(Freetype REQUIRED)
find_package(pugixml REQUIRED)
find_package(CLI11 REQUIRED)
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(UTF8PROC REQUIRED IMPORTED_TARGET libutf8proc)
pkg_check_modules(HARFBUZZ REQUIRED IMPORTED_TARGET harfbuzz)

# spdlog stays behind base/log.h: its fmt and the fmt inside Torch's include folder must never meet in one translation unit.
find_package(spdlog REQUIRED)
add_library(moegraft_spdlog INTERFACE)
target_link_libraries(moegraft_spdlog INTERFACE $<LINK_ONLY:spdlog::spdlog>)
add_library(moegraft::spdlog ALIAS moegraft_spdlog)

pkg_check_modules(SENTENCEPIECE REQUIRED IMPORTED_TARGET sentencepiece)
find_library(SENTENCEPIECE_TRAIN_LIBRARY sentencepiece_train REQUIRED)
add_library(moegraft_sentencepiece INTERFACE)
target_link_libraries(moegraft_sentencepiece INTERFACE ${SENTENCEPIECE_TRAIN_LIBRARY} PkgConfig::SENTENCEPIECE)
add_library(moegraft::sentencepiece ALIAS moegraft_sentencepiece)

find_program(CCACHE_PROGRAM ccache)
if(CCACHE_PROGRAM AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  # Sloppiness: ccache refuses precompiled headers without it.
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CMAKE_COMMAND} -E env CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime CCACHE_NOHASHDIR=1 CCACHE_BASEDIR=${CMAKE_SOURCE_DIR} ${CCACHE_PROGRAM})
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fpch-preprocess>)
endif()
find_program(MOLD_PROGRAM mold)
if(MOLD_PROGRAM)
  add_link_options(-fuse-ld=mold)
endif()

include(LibTorch)
