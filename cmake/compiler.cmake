# Refuses C++ compilers that lack parts of C++20, or functions of vectors: their errors would not say so.
set(oldest_GNU 11)
set(oldest_Clang 14)
set(oldest ${oldest_${CMAKE_CXX_COMPILER_ID}})
if(oldest AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS oldest)
  message(FATAL_ERROR "seqkern needs g++ ${oldest_GNU} or clang ${oldest_Clang} or newer; ${CMAKE_CXX_COMPILER} is "
                      "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}. The environment variable CXX chooses another.")
endif()
