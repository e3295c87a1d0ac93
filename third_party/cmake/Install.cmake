# cmake --install: libraries, public headers, the moegraft binary, the recipes, and a package that find_package(moegraft) reads.
include(CMakePackageConfigHelpers)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/moegraft)
get_property(exported GLOBAL PROPERTY MOEGRAFT_EXPORTED)
install(TARGETS ${exported} moegraft_flags EXPORT moegraftTargets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(EXPORT moegraftTargets NAMESPACE moegraft:: DESTINATION ${package_dir})
install(DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR}/include/moegraft DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h")
if(TARGET moegraft)
  install(TARGETS moegraft RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()
install(DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR}/configs DESTINATION ${CMAKE_INSTALL_DATADIR}/moegraft OPTIONAL)
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/moegraft OPTIONAL)

configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/moegraftConfig.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/moegraftConfig.cmake
                              INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/moegraftConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/moegraftConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/moegraftConfigVersion.cmake
              ${CMAKE_CURRENT_LIST_DIR}/Dependencies.cmake ${CMAKE_CURRENT_LIST_DIR}/LibTorch.cmake ${CMAKE_CURRENT_LIST_DIR}/Arrow.cmake ${CMAKE_CURRENT_LIST_DIR}/Cuda.cmake
        DESTINATION ${package_dir})
