#include "experiments/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace canopy {
namespace {

// Seldom enough to cost nothing and to keep a log short.
constexpr double kBarSeconds = 0.1;
constexpr double kLineSeconds = 15;
constexpr int kBarWidth = 24;

int TerminalWidth(FILE* out) {
  winsize size = {};
  if (ioctl(fileno(out), TIOCGWINSZ, &size) != 0 || size.ws_col == 0) return 80;
  return size.ws_col;
}

}  // namespace

std::string DurationText(double seconds) {
  const auto whole = static_cast<int64_t>(std::ceil(std::max(0.0, std::min(seconds, 1e9))));
  if (whole >= 3600) {
    return absl::StrFormat("%d:%02d:%02d", whole / 3600, whole / 60 % 60, whole % 60);
  }
  return absl::StrFormat("%d:%02d", whole / 60, whole % 60);
}

Progress::Progress(FILE* out, int64_t total, int64_t done)
    : out_(out),
      terminal_(isatty(fileno(out)) != 0),
      total_(total),
      done_(done),
      done_before_(done),
      start_(Clock::now()),
      drawn_(start_) {
  if (terminal_) Draw();
}

Progress::~Progress() { Clear(); }

void Progress::Add(int64_t tokens, int64_t rounds, double seconds) {
  ++done_;
  tokens_ += tokens;
  rounds_ += rounds;
  seconds_ += seconds;
  const Clock::time_point now = Clock::now();
  const double since = std::chrono::duration<double>(now - drawn_).count();
  if (since < (terminal_ ? kBarSeconds : kLineSeconds) && done_ != total_) return;
  drawn_ = now;
  Draw();
}

std::string Progress::Text() const {
  std::string text = absl::StrCat(done_, "/", total_, " answers");
  if (seconds_ > 0 && rounds_ > 0) {
    absl::StrAppend(&text, absl::StrFormat(", %.1f tokens/s, MAT %.2f", tokens_ / seconds_,
                                           static_cast<double>(tokens_) / rounds_));
  }
  if (done_ > done_before_ && done_ < total_) {
    const double elapsed = std::chrono::duration<double>(Clock::now() - start_).count();
    const double left = elapsed * (total_ - done_) / (done_ - done_before_);
    absl::StrAppend(&text, ", ", DurationText(left), " left");
  }
  return text;
}

void Progress::Draw() {
  const std::string text = Text();
  if (!terminal_) {
    std::fprintf(out_, "%s\n", text.c_str());
    std::fflush(out_);
    return;
  }
  const int filled = total_ > 0 ? static_cast<int>(kBarWidth * done_ / total_) : kBarWidth;
  std::string line =
      absl::StrCat("[", std::string(filled, '='), std::string(kBarWidth - filled, ' '), "] ", text);
  line.resize(std::min<size_t>(line.size(), std::max(20, TerminalWidth(out_) - 1)));
  std::fprintf(out_, "\r\033[K%s", line.c_str());
  std::fflush(out_);
  visible_ = true;
}

void Progress::Clear() {
  if (!visible_) return;
  std::fprintf(out_, "\r\033[K");
  std::fflush(out_);
  visible_ = false;
}

}  // namespace canopy
