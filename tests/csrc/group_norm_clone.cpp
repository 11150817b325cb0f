// One clone of the CPU operator of group norm with ReLU, for whatever processor this file is compiled for.
#define BASELINE_ONLY
#include "group_norm/cpu.cpp"

using namespace boosterbit;

namespace {

NormShape shape_of(const int64_t* s) { return {s[0], s[1], s[2], s[3], s[4] != 0, static_cast<Dtype>(s[5])}; }

}  // namespace

// `shape`: batch, channels, pixels, groups, channels-last, dtype.
extern "C" __attribute__((visibility("default"))) void forward(const int64_t* shape, const void* x, const float* gamma,
                                                               const float* beta, double eps, void* y, float* mean,
                                                               float* inverse) {
  group_norm_relu_cpu({shape_of(shape), x, gamma, beta, eps, y, mean, inverse});
}

// `parts`: room for 2 numbers for each channel of each sample.
extern "C" __attribute__((visibility("default"))) void backward(const int64_t* shape, const void* grad, const void* x,
                                                                const float* gamma, const float* beta,
                                                                const float* mean, const float* inverse,
                                                                const void* shortcut, void* grad_x,
                                                                float* parts, float* grad_gamma, float* grad_beta) {
  group_norm_relu_backward_cpu({shape_of(shape), grad, x, gamma, beta, mean, inverse, shortcut, grad_x, parts,
                                parts + shape[0] * shape[1], grad_gamma, grad_beta});
}
