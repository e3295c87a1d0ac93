# Installs the build BUILD_DIR into WORK_DIR/prefix, then configures, builds and runs the consumer project against it.
file(REMOVE_RECURSE ${WORK_DIR})
function(run what)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output TIMEOUT 240)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${what} failed (${result}):\n${output}")
  endif()
endfunction()
run("cmake --install" ${CMAKE_COMMAND} --install ${BUILD_DIR} --prefix ${WORK_DIR}/prefix)
# The headers of the source tree must not stand in for the installed ones, so the consumer is built away from it.
file(COPY ${CONSUMER_DIR}/ DESTINATION ${WORK_DIR}/source)
run("configuring the consumer" ${CMAKE_COMMAND} -G ${GENERATOR} -S ${WORK_DIR}/source -B ${WORK_DIR}/build -DCMAKE_PREFIX_PATH=${WORK_DIR}/prefix
    -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_COMPILER=${CXX} -DCMAKE_CXX_FLAGS=${CXX_FLAGS})
run("building the consumer" ${CMAKE_COMMAND} --build ${WORK_DIR}/build)
run("the consumer" ${CMAKE_COMMAND} -E chdir ${WORK_DIR}/build ./consumer)
run("the installed moegraft" ${WORK_DIR}/prefix/bin/moegraft --help)
