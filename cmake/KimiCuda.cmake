# SPDX-License-Identifier: MIT
# CUDA compilation: `_sm90.cu` for sm_90a, every other `.cu` for sm_80 with its PTX, which the driver
# compiles for later chips.
# The runtime is linked statically and the driver never, so the library loads without either.
if(NOT KIMI_OPS_CUDA MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "KIMI_OPS_CUDA: expected auto, on or off, got '${KIMI_OPS_CUDA}'")
endif()

# 80: machine code and PTX. Each further one, such as 90-real, takes as long to build again, and saves
# its chip the driver's compilation when a kernel is first used.
set(KIMI_OPS_GENERIC_ARCHITECTURES 80 CACHE STRING "Architectures of the kernels for every GPU")

# Waits for a random while before each flag between GPUs: for tests of their order.
option(KIMI_OPS_JITTER "Delay the flags of peer memory" OFF)

set(kimi_has_cuda OFF)
if(NOT KIMI_OPS_CUDA STREQUAL off)
  include(CheckLanguage)
  set(CMAKE_CUDA_ARCHITECTURES 80)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    set(kimi_has_cuda ON)
  elseif(KIMI_OPS_CUDA STREQUAL on)
    message(FATAL_ERROR "KIMI_OPS_CUDA=on, but no CUDA compiler was found: put nvcc on the PATH, "
                        "set CUDACXX to it, or build with KIMI_OPS_CUDA=off")
  endif()
endif()

set(KIMI_OPS_CUDA_ARCHITECTURES "")
if(kimi_has_cuda)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  set(CMAKE_CUDA_STANDARD 20)
  file(GLOB kimi_hopper_files CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/*/*_sm90.cu
       ${PROJECT_SOURCE_DIR}/csrc/*/*/*_sm90.cu)
  set(KIMI_OPS_CUDA_ARCHITECTURES "sm_80")
  if(kimi_hopper_files)
    string(APPEND KIMI_OPS_CUDA_ARCHITECTURES " sm_90a")
  endif()
  set(KIMI_OPS_CUDA_SUMMARY
      "${KIMI_OPS_CUDA_ARCHITECTURES} (nvcc ${CMAKE_CUDA_COMPILER_VERSION})")
  target_compile_definitions(kimi_build_flags INTERFACE KIMI_OPS_CUDA)
  target_compile_options(kimi_build_flags INTERFACE
    $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings --expt-relaxed-constexpr
    -Xcompiler=-Wall,-Wextra,-Werror>)
  if(KIMI_OPS_JITTER)
    target_compile_definitions(kimi_build_flags INTERFACE $<$<COMPILE_LANGUAGE:CUDA>:KIMI_OPS_JITTER>)
  endif()
elseif(KIMI_OPS_CUDA STREQUAL off)
  set(KIMI_OPS_CUDA_SUMMARY "off (KIMI_OPS_CUDA=off)")
else()
  set(KIMI_OPS_CUDA_SUMMARY "off (no nvcc found; KIMI_OPS_CUDA=on makes that an error)")
endif()
target_compile_definitions(kimi_build_flags INTERFACE
  KIMI_OPS_CUDA_ARCHITECTURES="${KIMI_OPS_CUDA_ARCHITECTURES}")

# Adds the kernels of every op to `library`.
function(kimi_add_cuda_kernels library)
  if(NOT kimi_has_cuda)
    return()
  endif()
  file(GLOB generic CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/*/*.cu
       ${PROJECT_SOURCE_DIR}/csrc/*/*/*.cu)
  set(hopper ${generic})
  list(FILTER hopper INCLUDE REGEX "_sm90\\.cu$")
  list(FILTER generic EXCLUDE REGEX "_sm90\\.cu$")
  foreach(group IN ITEMS generic hopper)
    if(${group})
      add_library(kimi_${group} OBJECT ${${group}})
      target_link_libraries(kimi_${group} PRIVATE kimi_build_flags)
      target_compile_options(kimi_${group} PRIVATE -Xptxas=-v)
      set(launcher sh ${PROJECT_SOURCE_DIR}/cmake/keep_ptxas.sh ${CMAKE_CUDA_COMPILER_LAUNCHER})
      set_target_properties(kimi_${group} PROPERTIES CUDA_COMPILER_LAUNCHER "${launcher}")
      target_sources(${library} PRIVATE $<TARGET_OBJECTS:kimi_${group}>)
    endif()
  endforeach()
  if(TARGET kimi_generic)
    set_target_properties(kimi_generic PROPERTIES
                          CUDA_ARCHITECTURES "${KIMI_OPS_GENERIC_ARCHITECTURES}")
  endif()
  if(TARGET kimi_hopper)
    set_target_properties(kimi_hopper PROPERTIES CUDA_ARCHITECTURES 90a-real)
  endif()
  find_package(CUDAToolkit REQUIRED)
  target_link_libraries(${library} PRIVATE CUDA::cudart_static)
endfunction()
