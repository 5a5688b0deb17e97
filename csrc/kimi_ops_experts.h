/* SPDX-License-Identifier: MIT
 *
 * The experts' part of the public C API; kimi_ops.h includes it and says the conventions.
 */
#ifndef KIMI_OPS_EXPERTS_H_
#define KIMI_OPS_EXPERTS_H_

#include "kimi_ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- grouped_gemm: one matrix product for each expert's rows --------------------------------- */

/* How weights lie in memory; the first three are kimi_dtype. Quantised weights are read only,
 * stored [E, N, K] with K contiguous and dequantised to the dtype of the rows they meet, rounded
 * once. */
typedef KIMI_ENUM(kimi_storage){
    KIMI_STORAGE_FLOAT32 = 0, KIMI_STORAGE_BFLOAT16 = 1, KIMI_STORAGE_FLOAT16 = 2,
    KIMI_STORAGE_FP8_BLOCK = 3, /* e4m3 times fp32 scale [E, ceil(N / 128), ceil(K / 128)] */
    KIMI_STORAGE_INT4_GROUP = 4 /* nibble - 8 (low nibble first) times bf16 [E, N, ceil(K / 32)] */
} kimi_storage;

/* out[r] (+)= a[r] b[e] + bias[e] for offsets[e-1] <= r < offsets[e]; other rows are zero (left
 * alone). csrc/grouped_gemm/grouped_gemm.h says how. On CUDA offsets are not checked (bad ones give
 * wrong rows) and b is not quantised. */
typedef struct kimi_grouped_gemm_params {
  const void* a;          /* [R, K] dtype, any strides */
  const void* b;          /* [E, K, N] b_storage, any strides; the dtype of a, or quantised */
  const void* b_scale;    /* of quantised b, dense; else NULL */
  const int32_t* offsets; /* [E] inclusive end rows, 0 <= offsets[0] <= ... <= R: checked */
  const int32_t* starts;  /* [E] first rows, offsets[e-1] <= starts[e] <= offsets[e]; NULL: those
                             of offsets[e-1] */
  const void* bias;       /* [E, N] dtype, dense, or NULL */
  void* out;              /* out [R, N] dense, out_dtype */
  void* workspace;        /* kimi_grouped_gemm_workspace_bytes() */
  size_t workspace_bytes; /* its size, at least what is asked for */
  int64_t num_rows;       /* R, below 2^31 */
  int64_t k;
  int64_t n;
  int64_t a_row_stride; /* strides in elements */
  int64_t a_k_stride;
  int64_t b_expert_stride;
  int64_t b_k_stride;
  int64_t b_n_stride;
  int32_t num_experts; /* E, 0 or more */
  int32_t accumulate;  /* 0 or 1: add to out */
  kimi_dtype dtype;
  kimi_storage b_storage;
  kimi_dtype out_dtype; /* dtype or KIMI_FLOAT32 */
} kimi_grouped_gemm_params;

/* Reads num_experts and dtype. 0 on CUDA. */
KIMI_API size_t kimi_grouped_gemm_workspace_bytes(const kimi_grouped_gemm_params* params,
                                                  kimi_device device);
KIMI_API kimi_status kimi_grouped_gemm(const kimi_grouped_gemm_params* params, kimi_device device,
                                       void* stream);

/* out[e] (+)= a[rows of e]^T dc[rows of e]; an expert without rows gives zeros (adds nothing). */
typedef struct kimi_grouped_gemm_wgrad_params {
  const void* a;          /* [R, K] dtype, any strides */
  const void* dc;         /* [R, N] dtype, any strides */
  const int32_t* offsets; /* [E] as above */
  const int32_t* starts;  /* [E] or NULL, as above */
  void* out;              /* out [E, K, N] out_dtype; one of the strides of K and N is 1 */
  void* workspace;        /* kimi_grouped_gemm_wgrad_workspace_bytes() */
  size_t workspace_bytes; /* its size, at least what is asked for */
  int64_t num_rows;       /* R, below 2^31 */
  int64_t k;
  int64_t n;
  int64_t a_row_stride;
  int64_t a_k_stride;
  int64_t dc_row_stride;
  int64_t dc_n_stride;
  int64_t out_expert_stride;
  int64_t out_k_stride;
  int64_t out_n_stride;
  int32_t num_experts;
  int32_t accumulate; /* 0 or 1: add to out */
  kimi_dtype dtype;
  kimi_dtype out_dtype; /* dtype or KIMI_FLOAT32 */
} kimi_grouped_gemm_wgrad_params;

/* Reads num_experts and dtype. */
KIMI_API size_t kimi_grouped_gemm_wgrad_workspace_bytes(
    const kimi_grouped_gemm_wgrad_params* params, kimi_device device);
KIMI_API kimi_status kimi_grouped_gemm_wgrad(const kimi_grouped_gemm_wgrad_params* params,
                                             kimi_device device, void* stream);

/* ---- grouped_gemm with FP8 rows and FP8 weights ---------------------------------------------- */

/* data[r, k] = e4m3(x[r, k] / s), s = scale[k / 128, r] = max(max |x| of the 128 columns / 448,
 * 2^-126): to nearest even. A block with a value that is not finite becomes NaN. With a plan the
 * rows of token t are row_map[t]: kimi_permute and this one in one pass. */
typedef struct kimi_fp8_rows_params {
  const void* x;    /* [R, K] dtype, K contiguous; with a plan [T, K] */
  void* data;       /* out [R, K] e4m3, dense */
  float* scale;     /* out [ceil(K / 128), R], row stride scale_stride */
  int64_t num_rows; /* R, below 2^31 */
  int64_t k;
  int64_t x_row_stride; /* strides in elements */
  int64_t scale_stride; /* R or more */
  kimi_dtype dtype;
  int32_t top_k;          /* 0: no plan, else row_map's columns */
  int64_t num_tokens;     /* with a plan: T */
  const int32_t* row_map; /* [T, top_k] of kimi_permute_plan; rows below R: checked on a CPU */
  const int32_t* source;  /* [R] of the plan: its -1 rows become zeros; NULL: they stay */
} kimi_fp8_rows_params;

KIMI_API kimi_status kimi_fp8_rows(const kimi_fp8_rows_params* params, kimi_device device,
                                   void* stream);

/* out[r] = a[r] b[e]^T + bias[e] for offsets[e-1] <= r < offsets[e]; rows from offsets[E-1] on are
 * zero. Products of 128 of depth are summed by the tensor cores, then scaled and summed in fp32.
 * CUDA with compute capability 9.x: 16 divides a, b, a_scale, k, a_row_stride, and 4
 * a_scale_stride; offsets are not checked (bad ones give wrong rows). On a CPU KIMI_UNSUPPORTED.
 * csrc/grouped_gemm/fp8.h says how. */
typedef struct kimi_grouped_gemm_fp8_params {
  const void* a;          /* [R, K] e4m3, K contiguous */
  const float* a_scale;   /* [ceil(K / 128), R] of kimi_fp8_rows */
  const void* b;          /* [E, N, K] e4m3, dense: KIMI_STORAGE_FP8_BLOCK */
  const float* b_scale;   /* [E, ceil(N / 128), ceil(K / 128)] dense */
  const int32_t* offsets; /* [E] inclusive end rows */
  const void* bias;       /* [E, N] out_dtype, dense, or NULL */
  void* out;              /* out [R, N] dense, out_dtype */
  int64_t num_rows;       /* R, K, N below 2^31 */
  int64_t k;
  int64_t n;
  int64_t a_row_stride;   /* in elements, as the next; K or more */
  int64_t a_scale_stride; /* R or more */
  int32_t num_experts;    /* 1 or more */
  kimi_dtype out_dtype;
} kimi_grouped_gemm_fp8_params;

KIMI_API kimi_status kimi_grouped_gemm_fp8(const kimi_grouped_gemm_fp8_params* params,
                                           kimi_device device, void* stream);
/* 1 where the current device has its kernel, else 0: then dequantise and call kimi_grouped_gemm. */
KIMI_API int32_t kimi_grouped_gemm_fp8_served(kimi_device device);

/* ---- fused_experts: the routed experts of one layer ------------------------------------------ */

typedef KIMI_ENUM(kimi_activation){
    KIMI_ACTIVATION_SILU = 0,      /* g sigmoid(g) u */
    KIMI_ACTIVATION_GELU = 1,      /* g Phi(g) u */
    KIMI_ACTIVATION_SITU = 2,      /* B tanh(g / B) sigmoid(g) * C tanh(u / C) */
    KIMI_ACTIVATION_GELU_TANH = 3, /* g sigmoid(2 sqrt(2 / pi) (g + 0.044715 g^3)) u */
    KIMI_ACTIVATION_RELU2 = 4,     /* max(g, 0)^2 u */
    KIMI_ACTIVATION_SWIGLU = 5     /* min(c sigmoid(alpha c), A) (v + shift), c = min(g, L), v = u
                                      within -M .. M */
} kimi_activation;

/* The letters of an activation; those that it does not have are not read. */
typedef struct kimi_activation_numbers {
  float gate_bound; /* SITU: B, above 0 */
  float up_bound;   /* SITU: C, above 0; INFINITY: u as it is */
  float alpha;      /* SWIGLU */
  float shift;
  float gate_limit; /* SWIGLU: L, above 0; INFINITY: none, as for the next two */
  float silu_limit; /* A */
  float up_limit;   /* M */
} kimi_activation_numbers;

/* A stack of experts' matrices, stored as [E, rows, columns]. */
typedef struct kimi_expert_weights {
  const void* data;
  const void* scale;     /* of quantised storage, dense: see kimi_storage; else NULL */
  int64_t expert_stride; /* strides in elements; quantised: columns contiguous */
  int64_t row_stride;
  int64_t column_stride;
  kimi_storage storage; /* the dtype of the tokens, or quantised */
} kimi_expert_weights;

/* y[t] = sum_k weights[t, k] (w_down[e] h + b_down[e]), h = act(g, u), [g; u] = w_gate_up[e] x[t] +
 * b_gate_up[e]. R = T K. csrc/fused_experts/fused_experts.h says how. The plan is checked, but not
 * on CUDA. There weights are not quantised, or with compute capability 9.x both are FP8 (dense, 16
 * divides their addresses and H, 128 divides F; no gate_up, biases, weights_first): rows of x and h
 * become FP8 then, as of kimi_fp8_rows. */
typedef struct kimi_fused_experts_params {
  const void* x;                 /* [T, H] dtype, row stride x_stride */
  kimi_expert_weights w_gate_up; /* [E, 2F, H], gate rows first */
  kimi_expert_weights w_down;    /* [E, H, F] */
  const void* b_gate_up;         /* [E, 2F] dtype, dense, or NULL */
  const void* b_down;            /* [E, H] dtype, dense, or NULL */
  const float* weights;          /* [T, K] */
  const int32_t* row_map;        /* [T, K], source [R], offsets [E] of kimi_permute_plan, align 1 */
  const int32_t* source;
  const int32_t* offsets;
  void* y;                /* out [T, H] dense, dtype */
  void* gate_up;          /* out [R, 2F] dense, dtype: [g; u] for the backward; or NULL */
  void* workspace;        /* kimi_fused_experts_workspace_bytes() */
  size_t workspace_bytes; /* its size, at least what is asked for */
  int64_t num_tokens;     /* T; T K must stay below 2^31 */
  int64_t hidden;         /* H */
  int64_t width;          /* F */
  int64_t x_stride;
  int32_t num_experts;   /* E, 1 or more */
  int32_t top_k;         /* K, 1 or more */
  int32_t weights_first; /* 0 or 1: weights multiply h, before it is rounded; without b_down only */
  kimi_dtype dtype;
  kimi_activation activation;
  kimi_activation_numbers numbers;
} kimi_fused_experts_params;

/* Reads the sizes, dtype and the storage of w_gate_up. */
KIMI_API size_t kimi_fused_experts_workspace_bytes(const kimi_fused_experts_params* params,
                                                   kimi_device device);
KIMI_API kimi_status kimi_fused_experts(const kimi_fused_experts_params* params, kimi_device device,
                                        void* stream);

/* All gradients from dy; NULL where one is not wanted. Weights are not quantised. */
typedef struct kimi_fused_experts_backward_params {
  const void* dy; /* [T, H] dtype, row stride dy_stride */
  const void* x;  /* [T, H] dtype, row stride x_stride */
  kimi_expert_weights w_gate_up;
  kimi_expert_weights w_down;
  const void* b_gate_up;
  const void* b_down;
  const float* weights;
  const int32_t* row_map;
  const int32_t* source;
  const int32_t* offsets;
  const void* gate_up;    /* [R, 2F] of the forward; NULL: computed again */
  void* dx;               /* out [T, H] dense, dtype */
  void* grad_w_gate_up;   /* out [E, 2F, H] dense, dtype */
  void* grad_w_down;      /* out [E, H, F] dense, dtype */
  void* grad_b_gate_up;   /* out [E, 2F] dense, dtype */
  void* grad_b_down;      /* out [E, H] dense, dtype */
  float* grad_weights;    /* out [T, K] */
  void* workspace;        /* kimi_fused_experts_backward_workspace_bytes() */
  size_t workspace_bytes; /* its size, at least what is asked for */
  int64_t num_tokens;
  int64_t hidden;
  int64_t width;
  int64_t dy_stride;
  int64_t x_stride;
  int32_t num_experts;
  int32_t top_k;
  kimi_dtype dtype;
  kimi_activation activation;
  kimi_activation_numbers numbers;
} kimi_fused_experts_backward_params;

/* Reads the sizes, dtype and whether gate_up is NULL. */
KIMI_API size_t kimi_fused_experts_backward_workspace_bytes(
    const kimi_fused_experts_backward_params* params, kimi_device device);
KIMI_API kimi_status kimi_fused_experts_backward(const kimi_fused_experts_backward_params* params,
                                                 kimi_device device, void* stream);

#ifdef __cplusplus
}
#endif

#endif /* KIMI_OPS_EXPERTS_H_ */
