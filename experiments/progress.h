// The progress of a run: a bar on a terminal, an occasional plain line elsewhere.

#ifndef CANOPY_EXPERIMENTS_PROGRESS_H_
#define CANOPY_EXPERIMENTS_PROGRESS_H_

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>

namespace canopy {

class Progress {
 public:
  // `total` answers, `done` of which are there already. Writes to `out`; a bar if it is a terminal.
  Progress(FILE* out, int64_t total, int64_t done);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // One more answer. Tokens, rounds and seconds are the speculative arms' (all arms' where there
  // are only plain ones): rate and MAT are running means over them.
  void Add(int64_t tokens, int64_t rounds, double seconds);
  // Wipes the bar so that something else can be printed.
  void Clear();

  // The line without bar and colour, for tests: "12/48 answers, 412.3 tokens/s, MAT 2.41, 0:31
  // left".
  std::string Text() const;

 private:
  using Clock = std::chrono::steady_clock;
  void Draw();

  FILE* out_;
  bool terminal_;
  int64_t total_;
  int64_t done_;
  int64_t done_before_;
  int64_t tokens_ = 0;
  int64_t rounds_ = 0;
  double seconds_ = 0;
  Clock::time_point start_;
  Clock::time_point drawn_;
  bool visible_ = false;
};

// "0:31", "12:05", "3:07:00".
std::string DurationText(double seconds);

}  // namespace canopy

#endif  // CANOPY_EXPERIMENTS_PROGRESS_H_
