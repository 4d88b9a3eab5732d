// Errors that the sanitizers must report, or else make sanitize would pass for want of them.
#include <thread>

extern "C" {

float planted_overrun(int size) {  // reads one float past the end
  const float* values = new float[size]();
  const float past = values[size];
  delete[] values;
  return past;
}

int planted_overflow(int most) { return most + 1; }

int planted_race(int count) {
  int sum = 0;
  const auto add = [&] {
    for (int i = 0; i < count; ++i) sum += i;
  };
  std::thread other(add);
  add();
  other.join();
  return sum;
}
}
