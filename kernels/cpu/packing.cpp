// Weights into the layout of layout.h, and rows out of it. Sources are row-major.

#include <cstring>

#include "layout.h"

extern "C" {

// Rows `ids` of a packed [n, k] as out [tokens, k]: a tied embedding is read out of the head.
void searoom_rows(const Matrix* matrix, const int32_t* ids, int tokens, int threads, float* out) {
  const Matrix& w = *matrix;
  const size_t k = w.k, groups = k / kGroup;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int t = 0; t < tokens; ++t) {
    const size_t panel = ids[t] / kLanes, lane = ids[t] % kLanes;
    for (size_t i = 0; i < k; ++i) {
      float& value = out[t * k + i];
      const size_t group = panel * groups + i / kGroup, within = i % kGroup;
      if (w.format == kBf16) {
        const size_t at = ((panel * (k / 2) + i / 4 * 2 + i % 2) * kLanes + lane) * 2 + i % 4 / 2;
        const uint32_t bits = uint32_t(reinterpret_cast<const bf16*>(w.values)[at]) << 16;
        std::memcpy(&value, &bits, 4);
      } else if (w.format == kQ8) {
        const uint8_t q = w.values[((panel * (k / 4) + i / 4) * kLanes + lane) * 4 + i % 4];
        value = _cvtsh_ss(w.scales[group * kLanes + lane]) * (int(q) - 128);
      } else {
        const uint8_t both = w.values[group * 256 + within % 16 / 4 * 64 + lane * 4 + within % 4];
        const uint16_t* scales = w.scales + group * 2 * kLanes + lane;
        value = _cvtsh_ss(scales[0]) * (within < 16 ? both & 15 : both >> 4) + _cvtsh_ss(scales[kLanes]);
      }
    }
  }
}

void searoom_pack_bf16(const bf16* from, int n, int k, bf16* to) {
#pragma omp parallel for schedule(static)
  for (int panel = 0; panel < n / kLanes; ++panel)
    for (int pair = 0; pair < k / 2; ++pair)
      for (int lane = 0; lane < kLanes; ++lane)
        for (int half = 0; half < 2; ++half)
          to[((size_t(panel) * (k / 2) + pair) * kLanes + lane) * 2 + half] =
              from[size_t(panel * kLanes + lane) * k + pair / 2 * 4 + pair % 2 + 2 * half];
}

// from: unsigned values [n, k], one a byte.
void searoom_pack_q8(const uint8_t* from, int n, int k, uint8_t* to) {
#pragma omp parallel for schedule(static)
  for (int panel = 0; panel < n / kLanes; ++panel)
    for (int four = 0; four < k / 4; ++four)
      for (int lane = 0; lane < kLanes; ++lane)
        std::memcpy(to + ((size_t(panel) * (k / 4) + four) * kLanes + lane) * 4,
                    from + size_t(panel * kLanes + lane) * k + 4 * four, 4);
}

void searoom_pack_q4(const uint8_t* from, int n, int k, uint8_t* to) {
#pragma omp parallel for schedule(static)
  for (int panel = 0; panel < n / kLanes; ++panel)
    for (int group = 0; group < k / kGroup; ++group)
      for (int lane = 0; lane < kLanes; ++lane) {
        const uint8_t* values = from + size_t(panel * kLanes + lane) * k + group * kGroup;
        uint8_t* block = to + (size_t(panel) * (k / kGroup) + group) * 256;
        for (int i = 0; i < 16; ++i) block[i / 4 * 64 + lane * 4 + i % 4] = values[i] | values[i + 16] << 4;
      }
}
}
