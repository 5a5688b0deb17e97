# SPDX-License-Identifier: MIT
# _simt: the Python module again, over a library whose CUDA kernels run on the host (tests/simt) and
# whose AMX engines run on a model of the tiles (tests/tiles). It is never installed; the Python tests
# load it as two more engines.
if(kimi_has_python)
  file(GLOB kimi_kernels CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/*/*.cu)
  list(REMOVE_ITEM kimi_kernels ${kimi_product_kernels})
  # Without nvcc the library's own files refuse CUDA tensors, which these must not.
  set(host $<TARGET_OBJECTS:kimi_host>)
  if(NOT kimi_has_cuda)
    set(host ${kimi_host_sources})
  endif()
  add_library(kimi_ops_simt STATIC ${host} $<TARGET_OBJECTS:kimi_tile_model>
              $<TARGET_OBJECTS:kimi_engine> $<TARGET_OBJECTS:kimi_simt_products>)
  target_link_libraries(kimi_ops_simt PUBLIC kimi_build_flags kimi_simt kimi_tiles)
  target_compile_definitions(kimi_ops_simt PRIVATE KIMI_OPS_CUDA)
  kimi_simt_kernels(kimi_ops_simt ${kimi_kernels})
  kimi_add_python_module(_simt)
  target_link_libraries(_simt PRIVATE kimi_ops_simt)
endif()
