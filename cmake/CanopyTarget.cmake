# Targets of the project: one library a folder, and the compile options they share.

add_library(canopy_options INTERFACE)
# Contraction is off because whether a compiler fuses a*b+c may differ from loop to loop, and a
# node's bits must not depend on which loop computed it; fused multiply-adds are written as such.
# Options are structs whose fields have defaults, so naming only some of them is meant.
target_compile_options(canopy_options INTERFACE
                       $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wno-missing-field-initializers
                       -Werror=return-type -ffp-contract=off>)
if(CANOPY_HAS_CUDA)
  target_compile_definitions(canopy_options INTERFACE CANOPY_CUDA)
  # Warning 554 is about a view's conversion to a read-only view of its own type.
  target_compile_options(canopy_options INTERFACE
                         $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr --diag-suppress=554>)
  target_link_libraries(canopy_options INTERFACE CUDA::cudart_static)
  if(CANOPY_RACECHECK)
    target_compile_definitions(canopy_options INTERFACE CANOPY_RACECHECK)
  endif()
endif()
if(CANOPY_SANITIZE)
  # Undefined behaviour ends the program as an address error does, so that a test fails by it. Line
  # tables are all that a report needs of the debug information.
  target_compile_options(canopy_options INTERFACE -fsanitize=${CANOPY_SANITIZE}
                         -fno-sanitize-recover=all -fno-omit-frame-pointer -g1)
  target_compile_definitions(canopy_options INTERFACE _GLIBCXX_ASSERTIONS)
  target_link_options(canopy_options INTERFACE -fsanitize=${CANOPY_SANITIZE})
endif()

# canopy_library(FOLDER DEPS ...): the library canopy_FOLDER of every source in FOLDER. Its headers
# are reached through a directory that holds a link to FOLDER alone, which is what keeps a folder
# from including one that it does not depend on.
function(canopy_library folder)
  cmake_parse_arguments(arg "" "" "DEPS" ${ARGN})
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/${folder}/*.cc)
  list(FILTER sources EXCLUDE REGEX "/main\\.cc$")
  if(CANOPY_HAS_CUDA)
    file(GLOB_RECURSE cuda_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/${folder}/*.cu)
    list(APPEND sources ${cuda_sources})
  endif()
  set(layer ${CMAKE_BINARY_DIR}/layers/${folder})
  file(MAKE_DIRECTORY ${layer})
  file(CREATE_LINK ${CMAKE_SOURCE_DIR}/${folder} ${layer}/${folder} SYMBOLIC)
  if(sources)
    add_library(canopy_${folder} STATIC ${sources})
    target_link_libraries(canopy_${folder} PUBLIC canopy_options ${arg_DEPS})
    target_include_directories(canopy_${folder} PUBLIC ${layer})
  else()
    add_library(canopy_${folder} INTERFACE)
    target_link_libraries(canopy_${folder} INTERFACE canopy_options ${arg_DEPS})
    target_include_directories(canopy_${folder} INTERFACE ${layer})
  endif()
endfunction()

# canopy_binary(NAME SOURCES ... DEPS ...): an executable at the top of the build folder.
function(canopy_binary name)
  cmake_parse_arguments(arg "" "" "SOURCES;DEPS" ${ARGN})
  add_executable(${name} ${arg_SOURCES})
  target_link_libraries(${name} PRIVATE ${arg_DEPS})
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR})
endfunction()
