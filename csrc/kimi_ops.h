/* SPDX-License-Identifier: MIT
 *
 * The public C API of kimi_ops. C99; it includes kimi_ops_optimizer.h and needs no other header.
 *
 * Conventions
 *   - Every op takes one params struct, the device its pointers live on, and a stream last (a
 *     cudaStream_t for KIMI_DEVICE_CUDA, ignored for KIMI_DEVICE_CPU). CUDA work is queued, not
 *     awaited; nothing is read back to the host, so every op can be captured in a CUDA graph.
 *   - The caller owns all memory: inputs, outputs, workspace. Nothing is allocated or kept.
 *   - Zero-initialise params (`kimi_topk_gate_params p = {0};`), then set every field whose comment
 *     names no default: NULL stands for an optional tensor, 0 for no choice.
 *   - Tensors are row-major and dense unless a stride field says otherwise.
 *   - Functions return KIMI_OK or an error; kimi_last_error() says what was expected, what came and
 *     how to mend it. Arguments are checked before anything is launched or written.
 *   - Thread-safe: calls on different data may run at once; the error text is per thread.
 *
 * Shape letters: T tokens, E experts, K experts chosen a token (top-k), N sequences of S tokens.
 */
#ifndef KIMI_OPS_H_
#define KIMI_OPS_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define KIMI_API
#else
#define KIMI_API __attribute__((visibility("default")))
#endif

/* 32 bits, and in C++ any value is a valid object: a wrong one is refused, not undefined. */
#if defined(__cplusplus)
#define KIMI_ENUM(name) enum name : int32_t
#else
#define KIMI_ENUM(name) enum name
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef KIMI_ENUM(kimi_status){
    KIMI_OK = 0, KIMI_INVALID_ARGUMENT = 1, /* a params field is wrong; nothing was written */
    KIMI_UNSUPPORTED = 2,   /* no engine for this device or architecture in this build */
    KIMI_CUDA_ERROR = 3,    /* the CUDA runtime refused */
    KIMI_INTERNAL_ERROR = 4 /* out of memory, or a defect of this library */
} kimi_status;

typedef KIMI_ENUM(kimi_device){KIMI_DEVICE_CPU = 0, KIMI_DEVICE_CUDA = 1} kimi_device;

typedef KIMI_ENUM(kimi_dtype){KIMI_FLOAT32 = 0, KIMI_BFLOAT16 = 1, KIMI_FLOAT16 = 2} kimi_dtype;

/* ---- the library ---------------------------------------------------------------------------- */

KIMI_API const char* kimi_version(void);
KIMI_API const char* kimi_last_error(void);

/* CPU instruction sets, weakest first. The best one that this machine offers is taken; the
 * environment variable KIMI_OPS_ISA (portable | avx2 | avx512 | avx512_bf16 | amx) or kimi_set_isa
 * forces one. */
typedef KIMI_ENUM(kimi_isa){
    KIMI_ISA_PORTABLE = 0, KIMI_ISA_AVX2 = 1, /* AVX2, FMA, F16C */
    KIMI_ISA_AVX512 = 2,                      /* AVX-512 F, BW, VL, DQ, CD */
    KIMI_ISA_AVX512_BF16 = 3,                 /* and its products of bf16 pairs */
    KIMI_ISA_AMX = 4                          /* and AMX-TILE, AMX-BF16, granted by the kernel */
} kimi_isa;

KIMI_API kimi_isa kimi_detected_isa(void);
KIMI_API kimi_isa kimi_current_isa(void);
KIMI_API kimi_status kimi_set_isa(kimi_isa isa); /* refuses one that the machine lacks */
KIMI_API const char* kimi_isa_name(kimi_isa isa);

/* The instruction set whose engine serves CPU tensors of an op ("topk_gate"); NULL: no such op. */
KIMI_API const char* kimi_cpu_engine(const char* op);

/* Threads that CPU ops use from this thread; 0 restores OpenMP's own number. */
KIMI_API kimi_status kimi_set_num_threads(int num_threads);
KIMI_API int kimi_num_threads(void);

/* Asks for 2 MiB pages where memory lies that has not been touched yet; a hint, on Linux. */
KIMI_API void kimi_advise_huge_pages(void* memory, size_t bytes);

/* Architectures in the binary, as "sm_80 sm_90a"; empty for a build without CUDA. */
KIMI_API const char* kimi_cuda_architectures(void);

/* ---- topk_gate: router scores, top-k selection, expert counts ------------------------------- */

typedef KIMI_ENUM(kimi_score_function){
    KIMI_SCORE_SIGMOID = 0, KIMI_SCORE_SOFTMAX = 1,
    KIMI_SCORE_SQRTSOFTPLUS = 2 /* sqrt(log(1 + exp(z))) */
} kimi_score_function;

#define KIMI_TOPK_GATE_MAX_EXPERTS 1024
#define KIMI_TOPK_GATE_MAX_K 32
#define KIMI_TOPK_GATE_EPSILON 1e-20f

/* csrc/topk_gate/topk_gate.h defines the mathematics. */
typedef struct kimi_topk_gate_params {
  const void* logits;         /* [T, E] logits_dtype, row t at logits + t * logits_stride */
  const float* expert_bias;   /* [E] or NULL; acts on the selection only */
  const uint8_t* valid;       /* [T] or NULL; 0 drops the token */
  float* weights;             /* out [T, K] */
  int32_t* indices;           /* out [T, K], best first; -1 for a dropped token */
  int32_t* tokens_per_expert; /* out [E] */
  int64_t num_tokens;         /* T */
  int64_t logits_stride;      /* in elements, usually E; 0: every token reads the same row */
  int32_t num_experts;        /* E, at most KIMI_TOPK_GATE_MAX_EXPERTS */
  int32_t top_k;              /* K, at most KIMI_TOPK_GATE_MAX_K */
  int32_t num_groups;         /* a divisor of E; 1: no groups */
  int32_t topk_groups;        /* groups that take part, 1..num_groups */
  int32_t group_score_topk;   /* choice scores summed for the score of a group */
  int32_t renormalize;        /* 0 or 1 */
  float scaling_factor;
  kimi_dtype logits_dtype;
  kimi_score_function score_function;
} kimi_topk_gate_params;

KIMI_API kimi_status kimi_topk_gate(const kimi_topk_gate_params* params, kimi_device device,
                                    void* stream);

/* d logits from d weights; `indices` of the forward, everything else is recomputed from logits. */
typedef struct kimi_topk_gate_backward_params {
  const float* grad_weights; /* [T, K] */
  const void* logits;        /* [T, E] logits_dtype, row stride logits_stride */
  const int32_t* indices;    /* [T, K]; a slot outside 0..E-1 (-1: dropped) takes no part */
  void* grad_logits;         /* out [T, E] dense, logits_dtype */
  int64_t num_tokens;
  int64_t logits_stride;
  int32_t num_experts;
  int32_t top_k;
  int32_t renormalize;
  float scaling_factor;
  kimi_dtype logits_dtype;
  kimi_score_function score_function;
} kimi_topk_gate_backward_params;

KIMI_API kimi_status kimi_topk_gate_backward(const kimi_topk_gate_backward_params* params,
                                             kimi_device device, void* stream);

/* ---- balance: what keeps the experts' loads even and the logits small ----------------------- */

/* csrc/balance/balance.h defines the mathematics. Losses are sums in a fixed order: the same bits
 * on every device and for any number of threads. */

typedef struct kimi_update_expert_bias_params {
  float* bias;                   /* in, out [E] */
  const void* tokens_per_expert; /* [E] int32_t, or int64_t where counts_are_int64 */
  int64_t num_experts;           /* E */
  float rate;
  int32_t counts_are_int64; /* 0 or 1 */
  int32_t centered;         /* 0: DeepSeek-V3's rule; 1: Moonlight's, without its mean */
} kimi_update_expert_bias_params;

KIMI_API kimi_status kimi_update_expert_bias(const kimi_update_expert_bias_params* params,
                                             kimi_device device, void* stream);

typedef struct kimi_sequence_balance_loss_params {
  const void* logits;         /* [T, E] logits_dtype, row t at logits + t * logits_stride */
  const int32_t* indices;     /* [T, K] chosen experts; ids outside 0..E-1 count for none */
  float* loss;                /* out [1] */
  int32_t* tokens_per_expert; /* out [N, E], counts of each sequence; the backward reads them */
  void* workspace;            /* kimi_sequence_balance_loss_workspace_bytes() */
  int64_t num_tokens;         /* T = N * S, the tokens of a sequence side by side; below 2^31 */
  int64_t num_sequences;      /* N, a divisor of T */
  int64_t logits_stride;      /* in elements, usually E */
  int32_t num_experts;        /* E, at most KIMI_TOPK_GATE_MAX_EXPERTS */
  int32_t top_k;              /* K, the width of indices */
  float coefficient;
  kimi_dtype logits_dtype;
  kimi_score_function score_function;
} kimi_sequence_balance_loss_params;

/* Device bytes, 4-byte aligned, for sizes that the op accepts. */
KIMI_API size_t kimi_sequence_balance_loss_workspace_bytes(int64_t num_tokens,
                                                           int64_t num_sequences,
                                                           int32_t num_experts);
KIMI_API kimi_status kimi_sequence_balance_loss(const kimi_sequence_balance_loss_params* params,
                                                kimi_device device, void* stream);

typedef struct kimi_sequence_balance_loss_backward_params {
  const float* grad_loss;           /* [1], read on the device */
  const void* logits;               /* [T, E] logits_dtype, row stride logits_stride */
  const int32_t* tokens_per_expert; /* [N, E] of the forward */
  void* grad_logits;                /* out [T, E] dense, logits_dtype */
  int64_t num_tokens;
  int64_t num_sequences;
  int64_t logits_stride;
  int32_t num_experts;
  int32_t top_k;
  float coefficient;
  kimi_dtype logits_dtype;
  kimi_score_function score_function;
} kimi_sequence_balance_loss_backward_params;

KIMI_API kimi_status kimi_sequence_balance_loss_backward(
    const kimi_sequence_balance_loss_backward_params* params, kimi_device device, void* stream);

typedef struct kimi_z_loss_params {
  const void* logits;    /* [T, E] logits_dtype, row stride logits_stride */
  const uint8_t* valid;  /* [T] or NULL; 0 leaves the token out, its logits are not read */
  float* loss;           /* out [1] */
  float* log_sum_exp;    /* out [T], 0 for a token left out; the backward reads them */
  int32_t* valid_tokens; /* out [1], how many tokens were not left out */
  void* workspace;       /* kimi_z_loss_workspace_bytes() */
  int64_t num_tokens;    /* T, below 2^31 */
  int64_t logits_stride; /* in elements, usually E */
  int32_t num_experts;   /* E, at most KIMI_TOPK_GATE_MAX_EXPERTS */
  float coefficient;
  kimi_dtype logits_dtype;
} kimi_z_loss_params;

/* Device bytes, 4-byte aligned. */
KIMI_API size_t kimi_z_loss_workspace_bytes(int64_t num_tokens);
KIMI_API kimi_status kimi_z_loss(const kimi_z_loss_params* params, kimi_device device,
                                 void* stream);

typedef struct kimi_z_loss_backward_params {
  const float* grad_loss;      /* [1], read on the device */
  const void* logits;          /* [T, E] logits_dtype, row stride logits_stride */
  const float* log_sum_exp;    /* [T] of the forward */
  const int32_t* valid_tokens; /* [1] of the forward */
  void* grad_logits;           /* out [T, E] dense, logits_dtype */
  int64_t num_tokens;
  int64_t logits_stride;
  int32_t num_experts;
  float coefficient;
  kimi_dtype logits_dtype;
} kimi_z_loss_backward_params;

KIMI_API kimi_status kimi_z_loss_backward(const kimi_z_loss_backward_params* params,
                                          kimi_device device, void* stream);

/* ---- permute: token rows to their experts' groups and back ----------------------------------- */

/* csrc/permute/permute.h defines the order and the sums. R = T * K + E * (align - 1) rows. */
typedef struct kimi_permute_plan_params {
  const int32_t* indices;     /* [T, K]; -1 or E: a dropped pair */
  int32_t* row_map;           /* out [T, K]: row of the pair; -1 dropped */
  int32_t* source;            /* out [R]: t * K + k; -1 padding */
  int32_t* offsets;           /* out [E]: one past the last row of each group, padding included */
  int32_t* tokens_per_expert; /* out [E]: without padding */
  void* workspace;            /* kimi_permute_plan_workspace_bytes() bytes, 16-byte aligned */
  int64_t num_tokens;         /* T; R must stay below 2^31 */
  int32_t num_experts;        /* E, at most KIMI_PERMUTE_MAX_EXPERTS */
  int32_t top_k;              /* K */
  int32_t align;              /* rows of a group are a multiple of it; at least 1 */
} kimi_permute_plan_params;

#define KIMI_PERMUTE_MAX_EXPERTS 1024

KIMI_API size_t kimi_permute_plan_workspace_bytes(const kimi_permute_plan_params* params,
                                                  kimi_device device);
/* Any other id: refused on a CPU, where the text names the first; on CUDA it counts as dropped. */
KIMI_API kimi_status kimi_permute_plan(const kimi_permute_plan_params* params, kimi_device device,
                                       void* stream);

/* y[row_map[t, k]] = x[t] byte for byte, rows with source -1 zero. */
typedef struct kimi_permute_params {
  const void* x;          /* [T] rows of row_bytes, row t at x + t * x_stride_bytes */
  const int32_t* row_map; /* [T, K] */
  const int32_t* source;  /* [R] */
  void* y;                /* out [R] rows of row_bytes, dense */
  int64_t num_tokens;
  int64_t num_rows; /* R */
  int64_t row_bytes;
  int64_t x_stride_bytes;
  int32_t top_k;
} kimi_permute_params;

KIMI_API kimi_status kimi_permute(const kimi_permute_params* params, kimi_device device,
                                  void* stream);

/* x[t] = sum over k of weights[t, k] * y[row_map[t, k]], in slot order, fp32, rounded once. */
typedef struct kimi_unpermute_params {
  const void* y;          /* [R, H] dtype, row r at y + r * y_stride elements */
  const int32_t* row_map; /* [T, K]; -1 adds nothing */
  const float* weights;   /* [T, K], or NULL for 1 */
  void* x;                /* out [T, H] dense, dtype */
  int64_t num_tokens;
  int64_t hidden; /* H */
  int64_t y_stride;
  int32_t top_k;
  kimi_dtype dtype;
} kimi_unpermute_params;

KIMI_API kimi_status kimi_unpermute(const kimi_unpermute_params* params, kimi_device device,
                                    void* stream);

/* One pass: grad_y[r] = weights[source[r]] * grad_x[source[r] / K], zero for padding, and
 * grad_weights[t, k] = <grad_x[t], y[row_map[t, k]]>, 0 for dropped pairs. */
typedef struct kimi_unpermute_backward_params {
  const void* grad_x;     /* [T, H] dtype, row t at grad_x + t * grad_x_stride elements */
  const void* y;          /* [R, H] dtype, row r at y + r * y_stride elements */
  const int32_t* row_map; /* [T, K] */
  const int32_t* source;  /* [R] */
  const float* weights;   /* [T, K] */
  void* grad_y;           /* out [R, H] dense, dtype */
  float* grad_weights;    /* out [T, K] */
  int64_t num_tokens;
  int64_t num_rows;
  int64_t hidden;
  int64_t grad_x_stride;
  int64_t y_stride;
  int32_t top_k;
  kimi_dtype dtype;
} kimi_unpermute_backward_params;

KIMI_API kimi_status kimi_unpermute_backward(const kimi_unpermute_backward_params* params,
                                             kimi_device device, void* stream);

/* y = the chunks of x in a new order; rows past the last chunk become zero rows at the end. */
typedef struct kimi_sort_chunks_params {
  const void* x;              /* [R] rows of row_bytes, row r at x + r * x_stride_bytes */
  const int32_t* split_sizes; /* [C] rows of each chunk of x, at most R together */
  const int32_t* order;       /* [C] a permutation of 0..C-1 */
  void* y;                    /* out [R] rows of row_bytes, dense */
  int64_t num_rows;           /* R */
  int64_t row_bytes;
  int64_t x_stride_bytes;
  int32_t num_chunks; /* C, at most KIMI_SORT_CHUNKS_MAX */
  int32_t inverse;    /* 1: undo; x is in the new order, split_sizes and order are as before */
} kimi_sort_chunks_params;

#define KIMI_SORT_CHUNKS_MAX 65536

KIMI_API kimi_status kimi_sort_chunks(const kimi_sort_chunks_params* params, kimi_device device,
                                      void* stream);

/* ---- grouped_gemm: one matrix product for each expert's rows --------------------------------- */

/* How weights lie in memory; the first three are kimi_dtype. Quantised weights are read only,
 * stored [E, N, K] with K contiguous and dequantised to the dtype of the rows they meet, rounded
 * once. */
typedef KIMI_ENUM(kimi_storage){
    KIMI_STORAGE_FLOAT32 = 0, KIMI_STORAGE_BFLOAT16 = 1, KIMI_STORAGE_FLOAT16 = 2,
    KIMI_STORAGE_FP8_BLOCK = 3, /* e4m3 times fp32 scale [E, ceil(N / 128), ceil(K / 128)] */
    KIMI_STORAGE_INT4_GROUP = 4 /* nibble - 8 (low nibble first) times bf16 [E, N, ceil(K / 32)] */
} kimi_storage;

/* out[r] = a[r] b[e] + bias[e] for offsets[e-1] <= r < offsets[e]; rows from offsets[E-1] on are
 * zero. CPU tensors; csrc/grouped_gemm/grouped_gemm.h says how. */
typedef struct kimi_grouped_gemm_params {
  const void* a;          /* [R, K] dtype, any strides */
  const void* b;          /* [E, K, N] b_storage, any strides; the dtype of a, or quantised */
  const void* b_scale;    /* of quantised b, dense; else NULL */
  const int32_t* offsets; /* [E] inclusive end rows, 0 <= offsets[0] <= ... <= R: checked */
  const void* bias;       /* [E, N] dtype, dense, or NULL */
  void* out;              /* out [R, N] dense, out_dtype */
  void* workspace;        /* kimi_grouped_gemm_workspace_bytes(), 64-byte aligned */
  int64_t num_rows;       /* R */
  int64_t k;
  int64_t n;
  int64_t a_row_stride; /* strides in elements */
  int64_t a_k_stride;
  int64_t b_expert_stride;
  int64_t b_k_stride;
  int64_t b_n_stride;
  int32_t num_experts; /* E */
  kimi_dtype dtype;
  kimi_storage b_storage;
  kimi_dtype out_dtype; /* dtype or KIMI_FLOAT32 */
} kimi_grouped_gemm_params;

/* Reads num_experts and dtype. The size is for the calling thread's number of threads and the
 * current instruction set: call the op under the same. */
KIMI_API size_t kimi_grouped_gemm_workspace_bytes(const kimi_grouped_gemm_params* params,
                                                  kimi_device device);
KIMI_API kimi_status kimi_grouped_gemm(const kimi_grouped_gemm_params* params, kimi_device device,
                                       void* stream);

/* out[e] (+)= a[rows of e]^T dc[rows of e]; an expert without rows gives zeros (adds nothing). */
typedef struct kimi_grouped_gemm_wgrad_params {
  const void* a;          /* [R, K] dtype, any strides */
  const void* dc;         /* [R, N] dtype, any strides */
  const int32_t* offsets; /* [E] as above */
  void* out;              /* out [E, K, N] out_dtype; one of the strides of K and N is 1 */
  void* workspace;        /* kimi_grouped_gemm_wgrad_workspace_bytes(), 64-byte aligned */
  int64_t num_rows;
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

/* ---- fused_experts: the routed experts of one layer ------------------------------------------ */

typedef KIMI_ENUM(kimi_activation){
    KIMI_ACTIVATION_SILU = 0, /* g sigmoid(g) u */
    KIMI_ACTIVATION_GELU = 1, /* g Phi(g) u */
    KIMI_ACTIVATION_SITU = 2  /* 4 tanh(g / 4) sigmoid(g) * 25 tanh(u / 25) */
} kimi_activation;

/* A stack of experts' matrices, stored as [E, rows, columns]. */
typedef struct kimi_expert_weights {
  const void* data;
  const void* scale;     /* of quantised storage, dense: see kimi_storage; else NULL */
  int64_t expert_stride; /* strides in elements; quantised: columns contiguous */
  int64_t row_stride;
  int64_t column_stride;
  kimi_storage storage; /* the dtype of the tokens, or quantised */
} kimi_expert_weights;

/* y[t] = sum_k weights[t, k] w_down[e] (act(g) u), [g; u] = w_gate_up[e] x[t]. R = T K. CPU
 * tensors; csrc/fused_experts/fused_experts.h says how. */
typedef struct kimi_fused_experts_params {
  const void* x;                 /* [T, H] dtype, row stride x_stride */
  kimi_expert_weights w_gate_up; /* [E, 2F, H], gate rows first */
  kimi_expert_weights w_down;    /* [E, H, F] */
  const float* weights;          /* [T, K] */
  const int32_t* row_map;        /* [T, K], source [R], offsets [E] of kimi_permute_plan, align 1 */
  const int32_t* source;
  const int32_t* offsets;
  void* y;         /* out [T, H] dense, dtype */
  void* gate_up;   /* out [R, 2F] dense, dtype: [g; u] for the backward; or NULL */
  void* workspace; /* kimi_fused_experts_workspace_bytes(), 64-byte aligned */
  int64_t num_tokens;
  int64_t hidden; /* H */
  int64_t width;  /* F */
  int64_t x_stride;
  int32_t num_experts;
  int32_t top_k;
  kimi_dtype dtype;
  kimi_activation activation;
} kimi_fused_experts_params;

/* Reads the sizes and dtype; for the calling thread's number of threads. */
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
  const float* weights;
  const int32_t* row_map;
  const int32_t* source;
  const int32_t* offsets;
  const void* gate_up;  /* [R, 2F] of the forward; NULL: computed again */
  void* dx;             /* out [T, H] dense, dtype */
  void* grad_w_gate_up; /* out [E, 2F, H] dense, dtype */
  void* grad_w_down;    /* out [E, H, F] dense, dtype */
  float* grad_weights;  /* out [T, K] */
  void* workspace;      /* kimi_fused_experts_backward_workspace_bytes(), 64-byte aligned */
  int64_t num_tokens;
  int64_t hidden;
  int64_t width;
  int64_t dy_stride;
  int64_t x_stride;
  int32_t num_experts;
  int32_t top_k;
  kimi_dtype dtype;
  kimi_activation activation;
} kimi_fused_experts_backward_params;

/* Reads the sizes, dtype and whether gate_up is NULL. */
KIMI_API size_t kimi_fused_experts_backward_workspace_bytes(
    const kimi_fused_experts_backward_params* params, kimi_device device);
KIMI_API kimi_status kimi_fused_experts_backward(const kimi_fused_experts_backward_params* params,
                                                 kimi_device device, void* stream);

#ifdef __cplusplus
}
#endif

#include "kimi_ops_optimizer.h" /* at the end: it uses the types above */

#endif /* KIMI_OPS_H_ */
