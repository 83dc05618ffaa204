// Counts the allocations of the program: linking this file replaces operator new.

#ifndef CANOPY_TESTS_SUPPORT_ALLOCATION_COUNTER_H_
#define CANOPY_TESTS_SUPPORT_ALLOCATION_COUNTER_H_

#include <cstdint>

namespace canopy::testing {

// Calls of operator new so far, by all threads.
int64_t Allocations();

}  // namespace canopy::testing

#endif  // CANOPY_TESTS_SUPPORT_ALLOCATION_COUNTER_H_
