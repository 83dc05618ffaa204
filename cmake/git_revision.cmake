# Writes OUTPUT, a source file with the revision of the git checkout at SOURCE_DIR. Run at every build;
# the file is touched only when the revision changed.
execute_process(COMMAND git -C ${SOURCE_DIR} describe --always --dirty --abbrev=12 --exclude=*
                OUTPUT_VARIABLE revision OUTPUT_STRIP_TRAILING_WHITESPACE
                ERROR_QUIET RESULT_VARIABLE failed)
if(failed OR revision STREQUAL "")
  set(revision "unknown")
endif()
set(text "#include \"experiments/version.h\"\n\nnamespace canopy {\nconst char* GitRevision() { return \"${revision}\"; }\n}  // namespace canopy\n")
set(old "")
if(EXISTS ${OUTPUT})
  file(READ ${OUTPUT} old)
endif()
if(NOT old STREQUAL text)
  file(WRITE ${OUTPUT} "${text}")
endif()
