# SPDX-License-Identifier: MIT
# The pybind11 modules: one for each engine library, whose name says which one. Their functions are
# the same and compiled once.
if(NOT KIMI_OPS_PYTHON MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "KIMI_OPS_PYTHON: expected auto, on or off, got '${KIMI_OPS_PYTHON}'")
endif()

set(kimi_has_python OFF)
set(KIMI_OPS_PYTHON_SUMMARY "off (KIMI_OPS_PYTHON=${KIMI_OPS_PYTHON})")
if(NOT KIMI_OPS_PYTHON STREQUAL off)
  set(PYBIND11_FINDPYTHON ON)
  find_package(Python 3.11 COMPONENTS Interpreter Development.Module)
  if(Python_FOUND AND NOT pybind11_DIR)
    execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
                    OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
  if(Python_FOUND)
    find_package(pybind11 CONFIG QUIET)
  endif()
  if(pybind11_FOUND)
    set(kimi_has_python ON)
    set(KIMI_OPS_PYTHON_SUMMARY "${Python_VERSION} (pybind11 ${pybind11_VERSION})")
  elseif(KIMI_OPS_PYTHON STREQUAL on)
    message(FATAL_ERROR "KIMI_OPS_PYTHON=on, but Python >= 3.11 with pybind11 was not found: "
                        "install pybind11 for the Python in -DPython_EXECUTABLE")
  else()
    set(KIMI_OPS_PYTHON_SUMMARY "off (Python >= 3.11 with pybind11 was not found)")
  endif()
endif()

if(kimi_has_python)
  file(GLOB kimi_bindings CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/bindings/*.cpp
       ${PROJECT_SOURCE_DIR}/csrc/bindings/xla/*.cpp
       ${PROJECT_SOURCE_DIR}/csrc/comm/*.cpp)
  list(FILTER kimi_bindings EXCLUDE REGEX "/(c_api|module)\\.cpp$")
  add_library(kimi_python OBJECT ${kimi_bindings})
  target_link_libraries(kimi_python PRIVATE kimi_build_flags pybind11::module)
endif()

function(kimi_add_python_module name)
  if(kimi_has_python)
    pybind11_add_module(${name} MODULE NO_EXTRAS ${PROJECT_SOURCE_DIR}/csrc/bindings/module.cpp
                        $<TARGET_OBJECTS:kimi_python>)
    target_compile_definitions(${name} PRIVATE KIMI_MODULE_NAME=${name})
    target_link_libraries(${name} PRIVATE kimi_build_flags)
  endif()
endfunction()
