# SPDX-License-Identifier: MIT
# Where the library, its headers and what other builds find them by go, twice:
#   cmake --install build [--prefix P]   lib/, include/, lib/cmake/kimi_ops/, lib/pkgconfig/
#   component `library` (setup.py)       the same within the Python package, the library at its root
# Both can be moved: their files find each other by where they lie.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(kimi_headers csrc/kimi_ops.h csrc/kimi_ops_experts.h csrc/kimi_ops_optimizer.h
    csrc/kimi_ops_parallel.h)
target_include_directories(kimi_ops INTERFACE $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/csrc>)
set(kimi_cmake_files ${PROJECT_BINARY_DIR}/cmake)
# Structs may grow with every version: none stands for another.
write_basic_package_version_file(${kimi_cmake_files}/kimi_opsConfigVersion.cmake
                                 COMPATIBILITY ExactVersion)

# kimi_install(<name> <library> <headers> <cmake> <pkgconfig> [argument of install() ...])
function(kimi_install name library headers cmake pkgconfig)
  install(TARGETS kimi_ops EXPORT ${name} LIBRARY DESTINATION ${library} ${ARGN}
          INCLUDES DESTINATION ${headers})
  install(FILES ${kimi_headers} DESTINATION ${headers} ${ARGN})
  install(EXPORT ${name} NAMESPACE kimi_ops:: DESTINATION ${cmake} FILE kimi_opsConfig.cmake ${ARGN})
  install(FILES ${kimi_cmake_files}/kimi_opsConfigVersion.cmake DESTINATION ${cmake} ${ARGN})
  cmake_path(RELATIVE_PATH library BASE_DIRECTORY ${pkgconfig} OUTPUT_VARIABLE kimi_library)
  cmake_path(RELATIVE_PATH headers BASE_DIRECTORY ${pkgconfig} OUTPUT_VARIABLE kimi_include)
  configure_file(${PROJECT_SOURCE_DIR}/cmake/kimi_ops.pc.in ${kimi_cmake_files}/${name}/kimi_ops.pc
                 @ONLY)
  install(FILES ${kimi_cmake_files}/${name}/kimi_ops.pc DESTINATION ${pkgconfig} ${ARGN})
endfunction()

kimi_install(kimi_ops_system ${CMAKE_INSTALL_LIBDIR} ${CMAKE_INSTALL_INCLUDEDIR}
             ${CMAKE_INSTALL_LIBDIR}/cmake/kimi_ops ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
kimi_install(kimi_ops_package . include cmake pkgconfig COMPONENT library EXCLUDE_FROM_ALL)
