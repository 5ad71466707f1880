# libseqkern_cuda.so: the CUDA kernels, and the torch layer registering them for CUDA tensors.
#
# Sets cuda_toolkit and cuda_architectures for _C's build_info.

find_program(NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin)
if(NOT NVCC)
  message(FATAL_ERROR "SEQKERN_CUDA=ON needs nvcc on PATH, or CUDA_HOME set")
endif()

# CMAKE_CUDA_ARCHITECTURES, or CMake's own variable in the environment, is a choice of one's own.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND "$ENV{CUDAARCHS}" STREQUAL "")
  include(cmake/architectures.cmake)
  seqkern_cuda_architectures(${NVCC} CMAKE_CUDA_ARCHITECTURES)
endif()

if(NOT DEFINED CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_COMPILER ${NVCC})
endif()
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(cuda_toolkit ${CMAKE_CUDA_COMPILER_VERSION})
list(JOIN CMAKE_CUDA_ARCHITECTURES " " cuda_architectures)

option(SEQKERN_KERNEL_TABLE "Keep ptxas's resource report beside each object (tools/kernel_table.py)" OFF)
if(SEQKERN_KERNEL_TABLE)
  list(PREPEND CMAKE_CUDA_COMPILER_LAUNCHER ${Python_EXECUTABLE}
       ${CMAKE_SOURCE_DIR}/tools/kernel_table.py compile)
endif()

# torch's stream and GEMMs come from functions in libtorch_cuda.so, which a CPU build of torch lacks. So link an
# empty library of the same name, made here: at run time the CUDA torch that is already loaded provides it.
file(GENERATE OUTPUT ${CMAKE_BINARY_DIR}/torch_cuda_stub.cpp
     CONTENT "extern \"C\" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }
extern \"C\" int aoti_torch_cuda_mm_out(void*, void*, void*) { return 1; }
extern \"C\" int aoti_torch_cuda_addmm_out(void*, void*, void*, void*, double, double) { return 1; }\n")
add_library(torch_cuda_stub SHARED ${CMAKE_BINARY_DIR}/torch_cuda_stub.cpp)
set_target_properties(torch_cuda_stub PROPERTIES
  OUTPUT_NAME torch_cuda  # SONAME libtorch_cuda.so
  LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/torch_cuda_stub
  CXX_VISIBILITY_PRESET default)

add_library(seqkern_cuda MODULE ${SEQKERN_CUDA_SOURCES} csrc/cuda/resources.cpp ${torch_sources})
target_compile_definitions(seqkern_cuda PRIVATE SEQKERN_BACKEND_CUDA)
target_include_directories(seqkern_cuda SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_link_libraries(seqkern_cuda PRIVATE seqkern_options torch_stable torch_cuda_stub)
# Line numbers for profilers cost nothing at run time, and compressed a sixth of their size on disk.
target_compile_options(seqkern_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:-lineinfo -Xfatbin=-compress-all -Xcompiler=-Wall,-Wextra>
  $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${SEQKERN_KERNEL_TABLE}>>:-Xptxas=-v>
  $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${SEQKERN_WERROR}>>:-Werror=all-warnings -Xcompiler=-Werror>)
# The runtime is linked statically and kept hidden. Then the library needs no libcudart of the toolkit's own
# major version beside torch's, and loads under any CUDA torch whose driver is new enough; contexts and
# streams are the driver's, so two copies of the runtime in a process share them.
set_target_properties(seqkern_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
set_source_files_properties(${SEQKERN_CUDA_SOURCES_WITHOUT_FMA} PROPERTIES COMPILE_OPTIONS --fmad=false)
target_link_options(seqkern_cuda PRIVATE -Wl,--exclude-libs,ALL)
install(TARGETS seqkern_cuda LIBRARY DESTINATION seqkern)
