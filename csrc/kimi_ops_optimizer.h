/* SPDX-License-Identifier: MIT
 *
 * The optimizer's part of the public C API; kimi_ops.h includes it and says the conventions.
 */
#ifndef KIMI_OPS_OPTIMIZER_H_
#define KIMI_OPS_OPTIMIZER_H_

#include "kimi_ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- newton_schulz: matrices with singular values near 1 ------------------------------------- */

/* csrc/newton_schulz/newton_schulz.h defines the mathematics and the order of the sums. On a CPU;
 * workspaces are 64-byte aligned and hold for the number of threads that was set when their size
 * was asked for. */

/* D = alpha A B + beta C + delta I, summed in fp32 and rounded once. D may lie on A, B or C; on a
 * GPU on C alone. */
typedef struct kimi_matrix_product_params {
  const void* a;   /* [M, K] dtype, element (i, k) at a_row_stride i + a_col_stride k */
  const void* b;   /* [K, N] dtype, any strides too */
  const void* c;   /* [M, N] dtype, rows dense, or NULL; symmetric: its lower triangle is read */
  void* d;         /* out [M, N] dtype, rows dense */
  void* workspace; /* kimi_matrix_product_workspace_bytes(); on a GPU none */
  int64_t rows, cols, depth; /* M, N, K */
  int64_t a_row_stride, a_col_stride, b_row_stride, b_col_stride, c_stride, d_stride;
  float alpha, beta, delta;
  int32_t symmetric; /* 1: D is symmetric (A A^T, commuting A and B): lower blocks, mirrored */
  kimi_dtype dtype;
} kimi_matrix_product_params;

KIMI_API size_t kimi_matrix_product_workspace_bytes(const kimi_matrix_product_params* params,
                                                    kimi_device device);
KIMI_API kimi_status kimi_matrix_product(const kimi_matrix_product_params* params,
                                         kimi_device device, void* stream);

typedef KIMI_ENUM(kimi_newton_schulz_method){KIMI_NEWTON_SCHULZ_STANDARD = 0,
                                             KIMI_NEWTON_SCHULZ_SYMMETRIC = 1,
                                             KIMI_NEWTON_SCHULZ_GRAM = 2} kimi_newton_schulz_method;

/* Matrices of one shape, each [M, N] at a pointer of its own. One of the two strides of g is 1, and
 * the same one of x. */
typedef struct kimi_newton_schulz_params {
  const void* const* g; /* [E] pointers, g_dtype; element (i, j) at g_row_stride i + ... */
  void* const* x;       /* out [E] pointers, x_dtype; may be g where strides and dtypes agree */
  const float* coefficients; /* [steps, 3]: a, b, c of each step */
  const int32_t* restarts;   /* [num_restarts] ascending, 1..steps-1; gram only */
  void* workspace;           /* kimi_newton_schulz_workspace_bytes() */
  int64_t num_matrices;      /* E */
  int64_t rows, cols;
  int64_t g_row_stride, g_col_stride, x_row_stride, x_col_stride;
  int32_t steps, num_restarts;
  float eps; /* the norm counts as at least eps; 0 guards exact zeros only */
  kimi_dtype g_dtype, dtype, x_dtype; /* dtype: of everything in between */
  kimi_newton_schulz_method method;
} kimi_newton_schulz_params;

KIMI_API size_t kimi_newton_schulz_workspace_bytes(const kimi_newton_schulz_params* params,
                                                   kimi_device device);
KIMI_API kimi_status kimi_newton_schulz(const kimi_newton_schulz_params* params, kimi_device device,
                                        void* stream);

/* ---- qk_clip: the largest attention logits, and the scaling that bounds them ----------------- */

/* csrc/qk_clip/qk_clip.h defines the mathematics. On a CPU. */
typedef struct kimi_attention_max_logits_params {
  const void* q;     /* [B, heads, queries, dim] dtype, any strides, in elements */
  const void* k;     /* [B, kv_heads, keys, dim] dtype, any strides */
  float* max_logits; /* out [heads] */
  void* workspace;   /* kimi_attention_max_logits_workspace_bytes(), 64-byte aligned */
  int64_t batch, heads, kv_heads, queries, keys, dim; /* kv_heads divides heads */
  int64_t q_batch_stride, q_head_stride, q_row_stride, q_col_stride;
  int64_t k_batch_stride, k_head_stride, k_row_stride, k_col_stride;
  float scale;    /* positive */
  int32_t causal; /* 1: query i sees keys 0..i + keys - queries */
  kimi_dtype dtype;
} kimi_attention_max_logits_params;

/* For the calling thread's number of threads. */
KIMI_API size_t kimi_attention_max_logits_workspace_bytes(
    const kimi_attention_max_logits_params* params, kimi_device device);
KIMI_API kimi_status kimi_attention_max_logits(const kimi_attention_max_logits_params* params,
                                               kimi_device device, void* stream);

/* Rows first..last-1 of every head's rows of the weight, times the factor of the head. */
typedef struct kimi_scale_rows_params {
  void* weight;         /* in, out [heads, rows_of_head, cols] dtype, row_stride between rows */
  const float* factors; /* [heads]; rows with a factor of 1 are not written */
  int64_t heads, rows_of_head, first, last, cols, row_stride;
  kimi_dtype dtype;
} kimi_scale_rows_params;

KIMI_API kimi_status kimi_scale_rows(const kimi_scale_rows_params* params, kimi_device device,
                                     void* stream);

/* ---- muon_clip: the elementwise passes of the optimizer -------------------------------------- */

/* csrc/muon_clip/muon_clip.h defines the mathematics. On a CPU. Tensors come as lists of `count`
 * pointers, each tensor dense with `sizes` elements. */
typedef struct kimi_muon_momentum_params {
  const void* const* grads; /* grad_dtype */
  void* const* buffers;     /* in, out buffer_dtype */
  float* const* updates;    /* out: what Newton-Schulz takes */
  const int64_t* sizes;     /* [count] */
  double* squares;          /* out [count] sums of the updates' squares, or NULL */
  int64_t count;
  double momentum;
  int32_t nesterov, maximize; /* 0 or 1 */
  kimi_dtype grad_dtype, buffer_dtype;
} kimi_muon_momentum_params;

KIMI_API kimi_status kimi_muon_momentum(const kimi_muon_momentum_params* params, kimi_device device,
                                        void* stream);

typedef struct kimi_muon_update_params {
  void* const* params;           /* in, out param_dtype */
  const void* const* directions; /* direction_dtype */
  void* const* copies;           /* out bf16, laid out as the parameters, or NULL */
  const int64_t* shapes;         /* [count, 4]: rows, columns, row stride of param and direction */
  const double* rates;           /* [count] */
  int64_t count;
  double decay;     /* lr times weight decay */
  int32_t cautious; /* 0 or 1 */
  kimi_dtype param_dtype, direction_dtype;
} kimi_muon_update_params;

KIMI_API kimi_status kimi_muon_update(const kimi_muon_update_params* params, kimi_device device,
                                      void* stream);

typedef struct kimi_adamw_params {
  void* const* params;       /* in, out param_dtype */
  const void* const* grads;  /* grad_dtype */
  float* const* exp_avgs;    /* in, out */
  float* const* exp_avg_sqs; /* in, out */
  const int64_t* sizes;      /* [count] */
  const int64_t* steps;      /* [count], from 1 */
  int64_t count;
  double lr, beta1, beta2, eps, weight_decay;
  int32_t maximize, cautious; /* 0 or 1 */
  kimi_dtype param_dtype, grad_dtype;
} kimi_adamw_params;

KIMI_API kimi_status kimi_adamw(const kimi_adamw_params* params, kimi_device device, void* stream);

/* squares[t] = the sum of x[t]^2, in fp64. */
typedef struct kimi_squares_params {
  const void* const* x; /* dtype */
  const int64_t* sizes; /* [count] */
  double* squares;      /* out [count] */
  int64_t count;
  kimi_dtype dtype;
} kimi_squares_params;

KIMI_API kimi_status kimi_squares(const kimi_squares_params* params, kimi_device device,
                                  void* stream);

#ifdef __cplusplus
}
#endif
#endif /* KIMI_OPS_OPTIMIZER_H_ */
