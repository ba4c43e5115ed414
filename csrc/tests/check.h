// Runs an operator with one thread, several threads, and from several threads at once, and compares bits.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "vidtok/common.h"

namespace vidtok_test {

// Runs one operator with so many threads and returns every byte it wrote.
using Run = std::function<std::vector<char>(int threads)>;

inline int failures = 0;

inline void expect(bool good, const std::string& what) {
  if (good) return;
  std::printf("FAILED %s\n", what.c_str());
  ++failures;
}

inline void ok(vidtok::Status status, const char* name) {
  if (status != vidtok::Status::ok) expect(false, std::string(name) + ": " + vidtok::last_message());
}

template <class T>
void append(std::vector<char>& out, const std::vector<T>& v) {
  const size_t before = out.size();
  out.resize(before + v.size() * sizeof(T));
  if (!v.empty()) std::memcpy(out.data() + before, v.data(), v.size() * sizeof(T));
}

template <class... Vectors>
std::vector<char> bytes(const Vectors&... vectors) {
  std::vector<char> out;
  (append(out, vectors), ...);
  return out;
}

inline std::vector<float> normal(int64_t n, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> draw;
  std::vector<float> out(n);
  for (float& v : out) v = draw(engine);
  return out;
}

inline void check(const std::string& name, const Run& run) {
  const std::vector<char> alone = run(1);
  for (int threads : {2, 3, 4}) expect(run(threads) == alone, name + " with " + std::to_string(threads) + " threads");
  std::vector<std::vector<char>> results(3);
  std::vector<std::thread> callers;
  for (auto& result : results) callers.emplace_back([&run, &result] { result = run(2); });
  for (auto& caller : callers) caller.join();
  for (const auto& result : results) expect(result == alone, name + " called from three threads at once");
  std::printf("%s\n", name.c_str());
}

}  // namespace vidtok_test
