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

/* csrc/newton_schulz/newton_schulz.h defines the mathematics and the order of the sums. */

/* D = alpha A B + beta C + delta I, summed in fp32 and rounded once. D may be C where their strides
 * agree; on a CPU it may also lie on A or B. */
typedef struct kimi_matrix_product_params {
  const void* a;   /* [M, K] dtype, element (i, k) at a_row_stride i + a_col_stride k */
  const void* b;   /* [K, N] dtype, any strides too */
  const void* c;   /* [M, N] dtype, rows dense, or NULL; symmetric: its lower triangle is read */
  void* d;         /* out [M, N] dtype, rows dense */
  void* workspace; /* kimi_matrix_product_workspace_bytes(); on a GPU none */
  size_t workspace_bytes;    /* its size, at least what is asked for */
  int64_t rows, cols, depth; /* M, N, K */
  int64_t a_row_stride, a_col_stride, b_row_stride, b_col_stride, c_stride, d_stride;
  float alpha, beta, delta; /* not all 0 */
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
 * the same one of x, whose other one is at least the length of these lines. */
typedef struct kimi_newton_schulz_params {
  const void* const* g; /* [E] pointers, g_dtype; element (i, j) at g_row_stride i + ... */
  void* const* x;       /* out [E] pointers, x_dtype; may be g where strides and dtypes agree */
  const float* coefficients; /* [steps, 3]: a, b, c of each step */
  const int32_t* restarts;   /* [num_restarts] ascending, 1..steps-1; gram only */
  void* workspace;           /* kimi_newton_schulz_workspace_bytes(); CUDA: 1 GiB at most, or what
                                one matrix takes: two X and four [m, m] in dtype */
  size_t workspace_bytes;    /* its size, at least what is asked for */
  int64_t num_matrices;      /* E */
  int64_t rows, cols;
  int64_t g_row_stride, g_col_stride, x_row_stride, x_col_stride;
  int32_t steps, num_restarts; /* 1 or more steps */
  float eps; /* 0 or more: the norm counts as at least eps; 0 guards exact zeros only */
  kimi_dtype g_dtype, dtype, x_dtype; /* dtype: of everything in between */
  kimi_newton_schulz_method method;
  int32_t aol; /* 1: after the norm, rows are scaled as AOL does, on the short side */
} kimi_newton_schulz_params;

KIMI_API size_t kimi_newton_schulz_workspace_bytes(const kimi_newton_schulz_params* params,
                                                   kimi_device device);
KIMI_API kimi_status kimi_newton_schulz(const kimi_newton_schulz_params* params, kimi_device device,
                                        void* stream);

/* ---- qk_clip: the largest attention logits, and the scaling that bounds them ----------------- */

/* csrc/qk_clip/qk_clip.h defines the mathematics. */
typedef struct kimi_attention_max_logits_params {
  const void* q;          /* [B, heads, queries, dim] dtype, any strides, in elements */
  const void* k;          /* [B, kv_heads, keys, dim] dtype, any strides */
  float* max_logits;      /* out [heads] */
  void* workspace;        /* kimi_attention_max_logits_workspace_bytes(); a CPU's */
  size_t workspace_bytes; /* its size, at least what is asked for */
  int64_t batch, heads, kv_heads, queries, keys, dim; /* kv_heads divides heads */
  int64_t q_batch_stride, q_head_stride, q_row_stride, q_col_stride;
  int64_t k_batch_stride, k_head_stride, k_row_stride, k_col_stride;
  float scale;    /* positive, finite */
  int32_t causal; /* 1: query i sees keys 0..i + keys - queries, which are no fewer than queries */
  kimi_dtype dtype;
} kimi_attention_max_logits_params;

KIMI_API size_t kimi_attention_max_logits_workspace_bytes(
    const kimi_attention_max_logits_params* params, kimi_device device);
KIMI_API kimi_status kimi_attention_max_logits(const kimi_attention_max_logits_params* params,
                                               kimi_device device, void* stream);

/* The heads of one layer, which follow those of the layer before. Of `members` neighbouring heads,
 * which divide `heads`, the smallest gamma counts for all. */
typedef struct kimi_clip_layer {
  int32_t heads, members;
} kimi_clip_layer;

/* Rows first_row .. of a projection [blocks, block_rows, cols]: of each head's block the first
 * `shared` rows take gamma^power and the `whole` next ones gamma. A bias has one column. */
typedef struct kimi_clip_weight {
  void* weight; /* in, out [rows, cols] dtype, row_stride between rows */
  int64_t first_row, rows, cols, row_stride;
  int32_t layer;              /* its number */
  int32_t blocks, block_rows; /* blocks divide the layer's heads: of queries or of keys */
  int32_t shared, whole;
  float power; /* 0..1 */
  kimi_dtype dtype;
} kimi_clip_weight;

/* Layers and weights are read on the host. */
typedef struct kimi_clip_rows_params {
  const kimi_clip_layer* layers;   /* [num_layers] */
  const kimi_clip_weight* weights; /* [num_weights], in the order of the layers */
  const float* max_logits;         /* [H] of all layers */
  float* gamma;                    /* out [H] */
  int64_t num_layers, num_weights;
  float tau; /* positive, finite */
} kimi_clip_rows_params;

KIMI_API kimi_status kimi_clip_rows(const kimi_clip_rows_params* params, kimi_device device,
                                    void* stream);

/* ---- muon_clip: the elementwise passes of the optimizer -------------------------------------- */

/* csrc/muon_clip/muon_clip.h defines the mathematics. Tensors come as lists of `count` pointers,
 * each tensor dense with `sizes` elements; the lists themselves lie on the host.
 *
 * `squares` (on the device, as all tensors) are sums of squares of pieces of gradients, and those
 * of tensor t are pieces[2 t] .. pieces[2 t + 1] - 1. A tensor with one that is not finite is left
 * alone, its state too. squares NULL: none is. */
typedef struct kimi_muon_momentum_params {
  const void* const* grads; /* grad_dtype */
  void* const* buffers;     /* in, out buffer_dtype */
  float* const* updates;    /* out: what Newton-Schulz takes; zeros of a tensor left alone */
  const int64_t* sizes;     /* [count] */
  const double* squares;    /* or NULL */
  const int64_t* pieces;    /* [count, 2] */
  int64_t count;
  double momentum;            /* 0..1 */
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
  const double* lr;              /* on the device, a factor of rates and decay; NULL: 1 */
  const double* weight_decay;    /* on the device, a factor of decay; NULL: 1 */
  const double* squares;         /* or NULL */
  const int64_t* pieces;         /* [count, 2] */
  int64_t count;
  double decay;     /* lr times weight decay */
  int32_t cautious; /* 0 or 1 */
  kimi_dtype param_dtype, direction_dtype;
} kimi_muon_update_params;

KIMI_API kimi_status kimi_muon_update(const kimi_muon_update_params* params, kimi_device device,
                                      void* stream);

typedef struct kimi_adamw_params {
  void* const* params;               /* in, out param_dtype */
  const void* const* grads;          /* grad_dtype */
  float* const* exp_avgs;            /* in, out */
  float* const* exp_avg_sqs;         /* in, out */
  float* const* steps;               /* in, out: updates so far, a number each, on the device */
  const int64_t* sizes;              /* [count] */
  const double* lr_factor;           /* on the device; NULL: 1 */
  const double* weight_decay_factor; /* on the device; NULL: 1 */
  const float* scale;                /* on the device: a factor of the gradients; NULL: 1 */
  double* squares;                   /* or NULL */
  const int64_t* pieces;             /* [count, 2] */
  void* workspace;                   /* kimi_adamw_workspace_bytes(); measure alone */
  size_t workspace_bytes;            /* its size, at least what is asked for */
  int64_t count;
  double lr, beta1, beta2, eps, weight_decay; /* betas 0..1 */
  int32_t maximize, cautious;                 /* 0 or 1 */
  int32_t measure; /* 1: before, the first piece of each tensor is set: 0, or NaN if not finite */
  kimi_dtype param_dtype, grad_dtype;
} kimi_adamw_params;

KIMI_API size_t kimi_adamw_workspace_bytes(const kimi_adamw_params* params, kimi_device device);
KIMI_API kimi_status kimi_adamw(const kimi_adamw_params* params, kimi_device device, void* stream);

/* squares[places[t]] = the sum of x[t]^2, in fp64. */
typedef struct kimi_squares_params {
  const void* const* x;   /* dtype */
  const int64_t* sizes;   /* [count] */
  const int64_t* places;  /* [count] */
  double* squares;        /* out */
  void* workspace;        /* kimi_squares_workspace_bytes() */
  size_t workspace_bytes; /* its size, at least what is asked for */
  int64_t count;
  kimi_dtype dtype;
} kimi_squares_params;

KIMI_API size_t kimi_squares_workspace_bytes(const kimi_squares_params* params, kimi_device device);
KIMI_API kimi_status kimi_squares(const kimi_squares_params* params, kimi_device device,
                                  void* stream);

/* min(1, max_norm / norm): what bounds the norm of gradients, those left alone not counted. */
typedef struct kimi_clip_factor_params {
  const double* squares;
  const int64_t* pieces;  /* [count, 2] */
  float* factor;          /* out, one */
  void* workspace;        /* kimi_clip_factor_workspace_bytes() */
  size_t workspace_bytes; /* its size, at least what is asked for */
  int64_t count;          /* 1 or more */
  double max_norm;        /* above 0 */
} kimi_clip_factor_params;

KIMI_API size_t kimi_clip_factor_workspace_bytes(const kimi_clip_factor_params* params,
                                                 kimi_device device);
KIMI_API kimi_status kimi_clip_factor(const kimi_clip_factor_params* params, kimi_device device,
                                      void* stream);

#ifdef __cplusplus
}
#endif
#endif /* KIMI_OPS_OPTIMIZER_H_ */
