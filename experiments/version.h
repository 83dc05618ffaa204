// Which Canopy this is.

#ifndef CANOPY_EXPERIMENTS_VERSION_H_
#define CANOPY_EXPERIMENTS_VERSION_H_

namespace canopy {

inline constexpr const char kVersion[] = CANOPY_VERSION;

// The commit that was built, with "-dirty" where the tree had changes; "unknown" outside git.
const char* GitRevision();

}  // namespace canopy

#endif  // CANOPY_EXPERIMENTS_VERSION_H_
