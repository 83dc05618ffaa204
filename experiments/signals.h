// Ctrl-C and SIGTERM as a flag that loops look at.

#ifndef CANOPY_EXPERIMENTS_SIGNALS_H_
#define CANOPY_EXPERIMENTS_SIGNALS_H_

#include <atomic>

namespace canopy {

// From now on the first SIGINT or SIGTERM sets the flag that is returned; the second one ends the
// process. A file-size limit becomes a write error instead of a signal.
const std::atomic<bool>* CatchStopSignals();

}  // namespace canopy

#endif  // CANOPY_EXPERIMENTS_SIGNALS_H_
