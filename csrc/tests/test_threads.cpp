// Every kernel with several threads, and called from several threads at once, gives the bits that
// one thread gives. Built with ThreadSanitizer by `make check-tsan`.
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "vidtok/plan_apply.h"

namespace {

using vidtok::DType;
using vidtok::Status;

// Runs one operator with so many threads and returns every byte it wrote.
using Run = std::function<std::vector<char>(int threads)>;

template <class T>
std::vector<char> bytes(const std::vector<T>& v) {
  std::vector<char> out(v.size() * sizeof(T));
  if (!out.empty()) std::memcpy(out.data(), v.data(), out.size());
  return out;
}

std::vector<float> normal(size_t n, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> draw;
  std::vector<float> out(n);
  for (float& v : out) v = draw(engine);
  return out;
}

int failures = 0;

void expect(bool good, const std::string& what) {
  if (good) return;
  std::printf("FAILED %s\n", what.c_str());
  ++failures;
}

void check(const std::string& name, const Run& run) {
  const std::vector<char> alone = run(1);
  for (int threads : {2, 3, 4}) expect(run(threads) == alone, name + " with " + std::to_string(threads) + " threads");
  std::vector<std::vector<char>> results(3);
  std::vector<std::thread> callers;
  for (auto& result : results) callers.emplace_back([&run, &result] { result = run(2); });
  for (auto& caller : callers) caller.join();
  for (const auto& result : results) expect(result == alone, name + " called from three threads at once");
  std::printf("%s\n", name.c_str());
}

void ok(Status status, const char* name) {
  expect(status == Status::ok, std::string(name) + ": " + vidtok::last_message());
}

void plan_apply() {
  const int64_t n = 4000, c = 96, m = n / 4;
  const auto x = normal(n * c, 1);
  std::vector<int32_t> anchor(m), member(n), offset(m + 1);
  const std::vector<float> weight(n, 0.25f);
  for (int64_t i = 0; i < n; ++i) member[i] = static_cast<int32_t>((i * 7) % n);
  for (int64_t i = 0; i < m; ++i) anchor[i] = member[4 * i];
  for (int64_t i = 0; i <= m; ++i) offset[i] = static_cast<int32_t>(4 * i);
  vidtok::PlanApplyArgs args{};
  args.dtype = DType::f32;
  args.n = n, args.m = m, args.c = args.x_stride = c;
  args.anchor = anchor.data();
  args.x = x.data();
  check("plan_apply, gather", [&](int threads) {
    std::vector<float> y(m * c);
    vidtok::PlanApplyArgs a = args;
    a.y = y.data(), a.threads = threads;
    ok(vidtok::plan_apply(a), "plan_apply");
    return bytes(y);
  });
  args.member = member.data(), args.offset = offset.data(), args.weight = weight.data(), args.nnz = n;
  check("plan_apply, means", [&](int threads) {
    std::vector<float> y(m * c);
    vidtok::PlanApplyArgs a = args;
    a.y = y.data(), a.threads = threads;
    ok(vidtok::plan_apply(a), "plan_apply");
    return bytes(y);
  });
  check("plan_apply backward", [&](int threads) {
    std::vector<float> grad(n * c);
    vidtok::PlanApplyArgs a = args;
    a.y = grad.data(), a.threads = threads;
    ok(vidtok::plan_apply_backward(a), "plan_apply_backward");
    return bytes(grad);
  });
}

}  // namespace

int main() {
  plan_apply();
  std::printf("%d failed\n", failures);
  return failures != 0;
}
