# SPDX-License-Identifier: MIT
# Host compilation: the flags of every file, and one rule for each ISA suffix.
find_package(OpenMP REQUIRED COMPONENTS CXX)

add_library(kimi_build_flags INTERFACE)
target_include_directories(kimi_build_flags INTERFACE ${PROJECT_SOURCE_DIR}/csrc)
target_link_libraries(kimi_build_flags INTERFACE OpenMP::OpenMP_CXX)
# No contraction: a*b+c is two roundings unless the source says fma, on every engine alike.
target_compile_options(kimi_build_flags INTERFACE
  $<$<COMPILE_LANGUAGE:C,CXX>:-Wall -Wextra -Werror -ffp-contract=off>)
if(KIMI_OPS_SANITIZE)
  add_compile_options($<$<COMPILE_LANGUAGE:C,CXX>:-fsanitize=${KIMI_OPS_SANITIZE}>
    $<$<COMPILE_LANGUAGE:C,CXX>:-fno-sanitize-recover=all>
    $<$<COMPILE_LANGUAGE:C,CXX>:-fno-omit-frame-pointer>)
  add_link_options(-fsanitize=${KIMI_OPS_SANITIZE})
endif()

set(KIMI_ISA_SUFFIXES x86 avx2 avx512 avx512_bf16 amx)
set(KIMI_FLAGS_x86 -mxsave)
set(KIMI_FLAGS_avx2 -mavx2 -mfma -mf16c -mbmi2)
set(KIMI_FLAGS_avx512 ${KIMI_FLAGS_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512cd
    -mprefer-vector-width=512)
set(KIMI_FLAGS_avx512_bf16 ${KIMI_FLAGS_avx512} -mavx512bf16 -mavx512vbmi -mprfchw)
set(KIMI_FLAGS_amx ${KIMI_FLAGS_avx512_bf16} -mamx-tile -mamx-bf16 -mamx-int8)
if(CMAKE_CXX_COMPILER_ID STREQUAL GNU)
  # GCC's own intrinsics start from a self-initialised undefined vector.
  foreach(suffix IN ITEMS avx512 avx512_bf16 amx)
    list(APPEND KIMI_FLAGS_${suffix} -Wno-maybe-uninitialized -Wno-uninitialized)
  endforeach()
endif()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(KIMI_OPS_X86 ON)
  target_compile_definitions(kimi_build_flags INTERFACE KIMI_OPS_X86)
  set(KIMI_OPS_CPU_SUMMARY "portable avx2 avx512 avx512_bf16 amx, chosen at run time")
else()
  set(KIMI_OPS_X86 OFF)
  set(KIMI_OPS_CPU_SUMMARY "portable (${CMAKE_SYSTEM_PROCESSOR})")
endif()

# Drops the files of instruction sets that this processor family does not have.
function(kimi_filter_host_sources list)
  if(NOT KIMI_OPS_X86)
    foreach(suffix IN LISTS KIMI_ISA_SUFFIXES)
      list(FILTER ${list} EXCLUDE REGEX "_${suffix}\\.cpp$")
    endforeach()
  endif()
  set(${list} ${${list}} PARENT_SCOPE)
endfunction()

# Source properties belong to a directory: call it beside every target that uses the files.
function(kimi_set_isa_flags)
  foreach(source IN LISTS ARGN)
    foreach(suffix IN LISTS KIMI_ISA_SUFFIXES)
      if(source MATCHES "_${suffix}\\.cpp$")
        set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${KIMI_FLAGS_${suffix}}")
      endif()
    endforeach()
  endforeach()
endfunction()
